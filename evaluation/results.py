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
        rows.append(
            {
                "image_id": entry["image_id"],
                "filename": entry["filename"],
                "caption": " ".join(caption.words),
                "score": caption.score,
                "references": [" ".join(words) for words in entry["references"]],
            }
        )
        if "source" in entry:
            rows[-1]["source"] = entry["source"]
        if scores is not None:
            rows[-1]["scores"] = scores[i]
    write_json(path, rows)


def read_results(path):
    """
    {image: (caption, references)}, as strings; an image is an image_id, or "SOURCE image_id" where
    the data set has several sources. Raises UserError if the file is not one of `write_results`, or
    if an image occurs in it twice.
    """
    rows, found = read_json(path, NEXT_STEP), {}
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} is not a list of captions; {NEXT_STEP}")
    for i, row in enumerate(rows):
        if reason := _defect(row):
            raise UserError(f"{path}, entry {i}: {reason}; {NEXT_STEP}")
        image = f"{row['source']} {row['image_id']}" if "source" in row else row["image_id"]
        if image in found:
            raise UserError(f"{path} has image {image} twice; give one caption per image")
        found[image] = row["caption"], row["references"]
    return found


def _defect(row):
    """What is wrong with a row, or None"""
    if not isinstance(row, dict):
        return "it is not an object"
    if type(row.get("image_id")) not in (int, str):
        return "its image_id is not a number or string"
    if not isinstance(row.get("caption"), str):
        return "its caption is not a string"
    texts = row.get("references")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return "its references are not a list of strings"
    return None
