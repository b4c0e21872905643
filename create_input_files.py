"""
Images and captions -> the files that train.py and eval.py read. Run it once per data set.

    python create_input_files.py                                    # the demo data set
    python create_input_files.py --dataset coco --karpathy_json dataset_coco.json --image_folder .
    python create_input_files.py --dataset mine --captions captions.csv --image_folder photos
    python create_input_files.py --dataset both --karpathy_json dataset_coco.json \
        dataset_flickr8k.json --image_folder coco Flicker8k_Dataset      # joined
"""

import os
import sys

from datasets import IMAGE_SIZE, MAX_SIZE, MIN_SIZE
from preprocessing.demo import make_demo
from preprocessing.input_files import create_input_files, data_set_name, refuse_existing
from preprocessing.own_captions import read_all_captions
from utils import Number, Parser, UserError, non_negative_int, process_count, run_script, small_int


def get_args(argv=None):
    parser = Parser(
        description="Convert images and captions to the files for training; without options, draw "
        "a small demo data set and convert it."
    )
    fraction = Number(float, minimum=0, below=1)
    size = Number(int, minimum=MIN_SIZE, maximum=MAX_SIZE)
    add = parser.add_argument_group("captions and images").add_argument
    add("--dataset", default="demo", help="its name: coco, flickr8k, flickr30k, demo or another")
    text = "captions and splits in Karpathy's format, or his .zip; several are joined into one set"
    add("--karpathy_json", nargs="+", metavar="FILE", help=text)
    text = "or captions of your own: CSV, TSV, JSONL, JSON, Flickr8k.token, COCO JSON, or a folder "
    text += "with a .txt beside each image"
    add("--captions", nargs="+", metavar="FILE", help=text)
    text = "where the images are; for several files a folder each, or one for all"
    add("--image_folder", nargs="+", metavar="FOLDER", help=text)
    for split, purpose in (("val", "validation"), ("test", "testing")):
        text = f"share of the images for {purpose}, if --captions has no column split"
        add(f"--{split}_fraction", type=fraction, default=0.1, help=text)
    add("--captions_per_image", type=small_int, default=5, help="captions sampled per image")
    text = "width and height to which images are resized; a model keeps that of its training"
    add("--image_size", type=size, default=IMAGE_SIZE, help=text)
    text = "words that occur at most this often become <unk>"
    add("--min_word_freq", type=non_negative_int, default=5, help=text)
    add("--max_len", type=small_int, default=50, help="longest caption to train on, in words")
    text = "for sampling captions, and for splits if --captions has none"
    add("--seed", type=non_negative_int, default=123, help=text)
    add = parser.add_argument_group("output").add_argument
    add("--output_folder", default="data", help="where to write the files")
    add("--overwrite", action="store_true", help="make the files again even if they exist")
    add("--skip_bad_images", action="store_true", help="leave out images that can't be read")
    text = "processes that decode images; all CPUs if not given"
    add("--workers", type=process_count, help=text)
    return parser.parse_args(argv)


def find_captions(args):
    """The captions that `create_input_files` takes, and the folder of their images."""
    if args.karpathy_json and args.captions:
        raise UserError("--karpathy_json and --captions exclude each other; pass one of them")
    if not (args.karpathy_json or args.captions):
        if args.dataset != "demo" or args.image_folder:
            raise UserError("no captions given; pass --karpathy_json FILE or --captions FILE")
        folder = os.path.join(args.output_folder, "demo")
        print(f"no --captions and no --karpathy_json: drawing the demo's scenes in {folder}")
        return make_demo(folder, workers=args.workers), folder
    if not args.image_folder:
        raise UserError("no images given; pass --image_folder FOLDER")
    if args.karpathy_json:
        return args.karpathy_json, args.image_folder
    sources = read_all_captions(args.captions, args.seed, args.val_fraction, args.test_fraction)
    splits = {image["split"] for source in sources for image in source["images"]}
    for split, purpose in {"val": "training", "test": "evaluation"}.items():
        if split not in splits:
            files = ", ".join(args.captions)
            print(f"warning: {files} has no {split} images, which {purpose} needs", file=sys.stderr)
    return sources, args.image_folder


def main():
    args = get_args()
    if not args.overwrite:  # before the demo is drawn
        name = data_set_name(args.dataset, args.captions_per_image, args.min_word_freq)
        refuse_existing(args.output_folder, name)
    captions, image_folder = find_captions(args)
    names = ("captions_per_image", "min_word_freq", "output_folder", "max_len", "workers", "seed")
    names += ("overwrite", "skip_bad_images", "image_size")
    options = {name: getattr(args, name) for name in names}
    create_input_files(args.dataset, captions, image_folder, **options)


if __name__ == "__main__":
    run_script(main)
