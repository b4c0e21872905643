"""
Images and captions -> the files that train.py and eval.py read. Run it once per data set; if it
is interrupted or killed, run the same command again to continue.

    python create_input_files.py                                    # the demo data set
    python create_input_files.py --dataset coco --karpathy_json dataset_coco.json --image_folder .
    python create_input_files.py --dataset mine --captions captions.csv --image_folder photos
    python create_input_files.py --dataset both --karpathy_json dataset_coco.json \
        dataset_flickr8k.json --image_folder coco Flicker8k_Dataset      # joined
"""

import os
import sys

from datasets import IMAGE_SIZE, LARGEST_SIZE, LEAST_SIZE
from preprocessing.demo import make_demo
from preprocessing.input_files import create_input_files
from preprocessing.own_captions import coco_split, read_captions
from utils import Number, Parser, UserError, non_negative_int, positive_int, run_script


def get_args(argv=None):
    parser = Parser(
        description="Convert images and captions to the files for training; without options, draw "
        "a small demo data set and convert it."
    )
    add = parser.add_argument_group("captions and images").add_argument
    add("--dataset", default="demo", help="its name: coco, flickr8k, flickr30k, demo or another")
    add(
        "--karpathy_json",
        nargs="+",
        metavar="FILE",
        help="captions and splits in Karpathy's "
        "format, or his .zip, of which dataset_{--dataset}.json is taken; several files are joined "
        "into one data set",
    )
    add(
        "--captions",
        nargs="+",
        metavar="FILE",
        help="or captions of your own: CSV, TSV, JSONL, "
        "JSON, Flickr8k.token, COCO JSON, or a folder with a .txt beside each image",
    )
    add(
        "--image_folder",
        nargs="+",
        metavar="FOLDER",
        help="where the images are; for several files a folder each, or one for all",
    )
    for split, purpose in (("val", "validation"), ("test", "testing")):
        add(
            f"--{split}_fraction",
            type=Number(float, least=0, below=1),
            default=0.1,
            help=f"share of the images for {purpose}, if --captions has no column split",
        )
    add("--captions_per_image", type=positive_int, default=5, help="captions sampled per image")
    add(
        "--image_size",
        type=Number(int, least=LEAST_SIZE, most=LARGEST_SIZE),
        default=IMAGE_SIZE,
        help="width and height to which images are resized; a model keeps that of its training",
    )
    add(
        "--min_word_freq",
        type=non_negative_int,
        default=5,
        help="words that occur at most this often become <unk>",
    )
    add("--max_len", type=positive_int, default=50, help="longest caption to train on, in words")
    add(
        "--seed",
        type=non_negative_int,
        default=123,
        help="for sampling captions, and for splits if --captions has none",
    )
    add = parser.add_argument_group("output").add_argument
    add("--output_folder", default="data", help="where to write the files")
    add("--overwrite", action="store_true", help="make the files again even if they exist")
    add("--skip_bad_images", action="store_true", help="leave out images that can't be read")
    add(
        "--workers",
        type=non_negative_int,
        help="processes that decode images; all CPUs if not given",
    )
    return parser.parse_args(argv)


def warn_of_empty_splits(path, images):
    for split, purpose in {"val": "training", "test": "evaluation"}.items():
        if not any(image["split"] == split for image in images):
            print(f"warning: {path} has no {split} images, which {purpose} needs", file=sys.stderr)


def find_captions(args):
    """The captions that `create_input_files` takes, and the folder of their images."""
    if args.karpathy_json and args.captions:
        raise UserError("--karpathy_json and --captions exclude each other; pass one of them")
    if not (args.karpathy_json or args.captions):
        if args.dataset != "demo" or args.image_folder:
            raise UserError("no captions given; pass --karpathy_json FILE or --captions FILE")
        folder = os.path.join(args.output_folder, "demo")
        print(f"no --captions and no --karpathy_json: drawing the demo's scenes in {folder}")
        return make_demo(folder), folder
    if not args.image_folder:
        raise UserError("no images given; pass --image_folder FOLDER")
    if args.karpathy_json:
        return args.karpathy_json, args.image_folder
    # COCO's files for training and validation, given together, say so in their names.
    splits = [coco_split(path) for path in args.captions]
    if not {"train", "val"} <= set(splits):
        splits = [None] * len(splits)
    captions = [
        read_captions(path, args.seed, args.val_fraction, args.test_fraction, split)
        for path, split in zip(args.captions, splits)
    ]
    warn_of_empty_splits(
        ", ".join(args.captions), [image for file in captions for image in file["images"]]
    )
    return captions, args.image_folder


def main():
    args = get_args()
    captions, image_folder = find_captions(args)
    create_input_files(
        args.dataset,
        captions,
        image_folder,
        args.captions_per_image,
        args.min_word_freq,
        args.output_folder,
        args.max_len,
        workers=args.workers,
        seed=args.seed,
        overwrite=args.overwrite,
        skip_bad_images=args.skip_bad_images,
        image_size=args.image_size,
    )


if __name__ == "__main__":
    run_script(main)
