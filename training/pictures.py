"""Validation photographs with the model's captions after each epoch, for TensorBoard."""

import html

import numpy as np
import torch

from modeling.beam_search import beam_search
from modeling.devices import autocast
from modeling.field_of_view import find_offset
from visualization.attention import attention_grid

COUNT = 8
DPI = 60  # pixels per inch: a panel takes about 40 kB


class ValidationPictures:
    """
    COUNT photographs spread over the validation images, the same ones in every epoch. data: the
    CaptionDataset of these images, of pixels and not of features; word_map: the model's
    """

    def __init__(self, data, word_map):
        indices = np.unique(np.linspace(0, len(data) - 1, COUNT).round().astype(int))
        self.images = data[indices].images  # uint8 (n, 3, S, S), n at most COUNT
        self.names, self.references, self.word_map = [], [], word_map
        for i in indices:
            entry = data.entry(i)
            name = "/".join(filter(None, (entry.get("source"), entry["filename"])))
            self.names.append(name or f"image {i}")
            self.references.append(" ".join(entry["references"][0]))

    def write(self, writer, state, epoch):
        """The photographs with their attention by the state's averaged models, and a table."""
        rows = ["| photograph | caption | one of its references |", "|---|---|---|"]
        offset = find_offset(state.averaged_encoder)
        photographs = zip(self.names, self.images, self.references, self._caption(state))
        for name, image, reference, (words, alphas) in photographs:
            texts = name, " ".join(words), reference
            texts = [html.escape(text).replace("|", "&#124;") for text in texts]  # <unk> is no tag
            rows.append(f"| {' | '.join(texts)} |")
            photograph = image.permute(1, 2, 0).numpy()
            figure = attention_grid(photograph, words, alphas, offset=offset, dpi=DPI)
            figure.canvas.draw()
            pixels = np.asarray(figure.canvas.buffer_rgba())
            writer.add_image(f"attention/{name}", pixels, epoch, dataformats="HWC")
        writer.add_text("captions", "\n".join(rows), epoch)

    @torch.inference_mode()
    def _caption(self, state):
        """Pairs of each caption's words and their attention (T, P), found as in the validation."""
        args, device = state.args, state.processes.device
        with autocast(device, args.amp):
            features = state.averaged_encoder.cells(self.images.to(device))
            decoder = state.averaged_decoder.eval()
            captions = beam_search(decoder, features, self.word_map, args.val_beam_size)
        words = {i: word for word, i in self.word_map.items()}
        return [([words[i] for i in caption.tokens], caption.alphas) for caption in captions]
