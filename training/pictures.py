"""Validation photographs with what the model says of them after each epoch, for TensorBoard."""

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
    COUNT photographs spread over the validation images, the same ones in every epoch.

    data: the CaptionDataset of these images, of pixels and not of features; word_map: the model's
    """

    def __init__(self, data, word_map):
        indices = np.unique(np.linspace(0, len(data) - 1, COUNT).round().astype(int))
        self.images = data[indices].images  # uint8 (n, 3, S, S), n at most COUNT
        entries = [data.entry(i) for i in indices]
        self.names = [
            "/".join(filter(None, (entry.get("source"), entry["filename"]))) or f"image {i}"
            for i, entry in zip(indices, entries)
        ]
        self.references = [" ".join(entry["references"][0]) for entry in entries]
        self.word_map = word_map

    def write(self, writer, state, epoch):
        """
        Caption the photographs and write them with their attention, and a table of the captions.

        writer: TensorBoard's SummaryWriter; state: TrainingState, whose averaged models are used;
        epoch: the step at which TensorBoard shows them
        """
        rows = ["| photograph | caption | one of its references |", "|---|---|---|"]
        offset = find_offset(state.averaged_encoder)
        for name, image, reference, (words, alphas) in zip(
            self.names, self.images, self.references, self._caption(state)
        ):
            rows.append(f"| {' | '.join(map(_escape, (name, ' '.join(words), reference)))} |")
            figure = attention_grid(
                image.permute(1, 2, 0).numpy(), words, alphas, offset=offset, dpi=DPI
            )
            figure.canvas.draw()
            writer.add_image(
                f"attention/{name}",
                np.asarray(figure.canvas.buffer_rgba()),
                epoch,
                dataformats="HWC",
            )
        writer.add_text("captions", "\n".join(rows), epoch)

    @torch.inference_mode()
    def _caption(self, state):
        """Pairs of each caption's words and their attention (T, P), searched for as validated."""
        args, device = state.args, state.processes.device
        with autocast(device, args.amp):
            features = state.averaged_encoder.cells(self.images.to(device))
            captions = beam_search(
                state.averaged_decoder.eval(), features, self.word_map, args.val_beam_size
            )
        words = {i: word for word, i in self.word_map.items()}
        return [([words[i] for i in caption.tokens], caption.alphas) for caption in captions]


def _escape(text):
    """Text for a cell of a Markdown table: <unk> is no HTML tag there"""
    return html.escape(text).replace("|", "&#124;")
