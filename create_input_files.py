"""
Captioned photographs -> the files that train.py and eval.py read. Run it once per data set; if it
is interrupted or killed, the same command goes on where it stood.

    python create_input_files.py                                    # the demo data set
    python create_input_files.py --dataset coco --karpathy_json dataset_coco.json --image_folder .
    python create_input_files.py --dataset mine --captions captions.csv --image_folder photos
"""

import os
import sys

from preprocessing.demo import make_demo
from preprocessing.input_files import create_input_files
from preprocessing.own_captions import read_captions
from utils import Number, Parser, UserError, non_negative_int, positive_int, run_script


def get_args(argv=None):
    parser = Parser(
        description="Turn captioned photographs into the files for training; without options, "
        "those of a small demo data set that is drawn first.")
    add = parser.add_argument_group("captions and images").add_argument
    add("--dataset", default="demo", help="coco, flickr8k, flickr30k, demo or a name of yours")
    add("--karpathy_json", help="captions and splits in Karpathy's format")
    add("--captions", help="or captions of your own: CSV, TSV, JSONL, Flickr8k.token, COCO JSON")
    add("--image_folder", help="where the images are")
    for split in ("val", "test"):
        add(f"--{split}_fraction", type=Number(float, least=0, below=1), default=0.1,
            help="of the images, if captions have no split")
    add("--captions_per_image", type=positive_int, default=5, help="captions sampled per image")
    add("--min_word_freq", type=non_negative_int, default=5,
        help="words not more frequent become <unk>")
    add("--max_len", type=positive_int, default=50, help="longest caption to train on, in words")
    add("--seed", type=int, default=123, help="of sampled captions, and of splits if we make them")
    add = parser.add_argument_group("output").add_argument
    add("--output_folder", default="data", help="where the files go")
    add("--overwrite", action="store_true", help="make the files anew, whatever is there")
    add("--skip_bad_images", action="store_true", help="leave out images that can't be read")
    add("--workers", type=non_negative_int,
        help="processes that decode images; all CPUs if not given")
    return parser.parse_args(argv)


def warn_of_empty_splits(path, images):
    for split, purpose in {"val": "choose the best epoch by", "test": "evaluate with"}.items():
        if not any(image["split"] == split for image in images):
            print(f"warning: {path} has no {split} images, to {purpose}", file=sys.stderr)


def find_captions(args):
    """The captions that `create_input_files` takes, and the folder of their images."""
    if args.karpathy_json and args.captions:
        raise UserError("--karpathy_json and --captions exclude each other")
    if not (args.karpathy_json or args.captions):
        if args.dataset != "demo" or args.image_folder:
            raise UserError("where are the captions? give --karpathy_json FILE or --captions FILE")
        folder = os.path.join(args.output_folder, "demo")
        print(f"no --captions and no --karpathy_json: the demo's scenes, in {folder}")
        return make_demo(folder), folder
    if not args.image_folder:
        raise UserError("where are the images? give --image_folder FOLDER")
    if args.karpathy_json:
        return args.karpathy_json, args.image_folder
    captions = read_captions(args.captions, args.seed, args.val_fraction, args.test_fraction)
    warn_of_empty_splits(args.captions, captions["images"])
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
    )


if __name__ == "__main__":
    run_script(main)
