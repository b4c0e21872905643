"""The files of eval.py --results: COCO's results format with further fields."""

from utils import UserError, read_json, write_json

NEXT_STEP = "write it with eval.py --results"


def write_results(path, data, captions, scores=None):
    """
    data: the CaptionDataset; captions: its ImageCaptions at one beam size
    scores: per image {metric: value}
    """
    rows = []
    for i, caption in enumerate(captions):
        entry = data.entry(i)
        row = {
            "image_id": entry["image_id"],
            "filename": entry["filename"],
            "caption": " ".join(caption.words),
            "score": caption.score,
            "references": [" ".join(words) for words in entry["references"]],
        }
        if "source" in entry:
            row["source"] = entry["source"]
        if scores is not None:
            row["scores"] = scores[i]
        rows.append(row)
    write_json(path, rows)


def read_results(path):
    """
    {image: (caption, references)}, lists of words; an image is an image_id, or "SOURCE image_id"
    where the data set has several sources. UserError unless `write_results` wrote such a file.
    """
    rows, found = read_json(path, NEXT_STEP), {}
    try:
        for row in rows:
            image = f"{row['source']} {row['image_id']}" if "source" in row else row["image_id"]
            if image in found:
                raise UserError(f"{path} has image {image} twice; give one caption per image")
            texts = [row["caption"], *row["references"]]
            "".join([str(image), *texts]).encode()
            found[image] = texts[0].split(), [text.split() for text in texts[1:]]
    except UnicodeEncodeError:
        raise UserError(f"{path}: image {image} has half a surrogate pair; remove it") from None
    except (TypeError, KeyError, AttributeError):
        found = {}
    if not found:
        raise UserError(f"{path} is not a list of captions with references; {NEXT_STEP}")
    return found
