"""The small demo data set that several tests train on or score."""

from checkpoints import PRETRAINED
from demo import make_demo
from utils import create_input_files

ENCODER = ["--encoder", "tf_efficientnet_lite2", "--encoder_weights", str(PRETRAINED)]

NAME = "demo_5_cap_per_img_0_min_word_freq"


def write_scenes(folder, train, val, test):
    """So many scenes and their input files in this folder, which is returned."""
    create_input_files("demo", make_demo(folder / "demo", train, val, test), folder / "demo",
                       min_word_freq=0, output_folder=folder, workers=1)
    return folder
