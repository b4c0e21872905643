"""
A page to try the model in a browser: drop, paste or snap a photograph. `python app.py` prints its
address. Photographs stay on this computer, for at most an hour, and are removed at the end.
"""

import os
import shutil
import signal
import socket
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from caption import Captioner
from checkpoints import add_model_options, find_model
from modeling.workers import SIGNALS
from utils import Number, Parser, UserError, add_device_options, exclusive_lock, run_script
from visualization import page

EXAMPLES = sorted((Path(__file__).parent / "docs" / "examples").glob("*.jpg"))
FOLDER = "show_attend_tell_app_"
SEARCHES = ("most probable", "most probable, with hard attention", "at random")


def get_args(argv=None):
    parser = Parser(description="A page to try the model in a browser.")
    add_model_options(parser.add_argument_group("model"))
    add = parser.add_argument_group("address").add_argument
    host, port = map(os.environ.get, ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"))
    text = "0.0.0.0: allow other computers; only this one if not given"
    add("--host", default=host, help=text)
    text = "the first free one from 7860 if not given"
    add("--port", type=Number(int, minimum=1, maximum=65535), default=port, help=text)
    add_device_options(parser.add_argument_group("device"))
    return parser.parse_args(argv)


def caption(gradio, captioner, photograph, words, beam_size, captions, temperature):
    """The caption of a photograph, a path or None, and HTML that shows where the model looked."""
    if photograph is None:
        return "", ""
    options = {"n_best": int(captions), "sample": True, "temperature": temperature}
    if words != SEARCHES[2]:  # another program may send fractions for whole numbers
        options = {"beam_size": int(beam_size), "hard_attention": words == SEARCHES[1]}
        options["n_best"] = min(int(captions), int(beam_size))
    try:
        captioned = captioner(photograph, evidence=True, **options)
    except UserError as error:
        line = str(error).replace(photograph, os.path.basename(photograph))
        raise gradio.Error(line, print_exception=False) from None
    return captioned.text, f"<style>{page.STYLE}</style>{page.view(captioned, 'p', page.HINT)}"


def build_page(gradio, captioner):
    photograph = gradio.Image(type="filepath", height=280)
    photograph.preprocess = lambda file: file and file.path  # our reader says what is wrong with it
    inputs = [
        photograph,
        gradio.Radio(SEARCHES, value=SEARCHES[0], label="Words"),
        gradio.Slider(1, 10, value=5, step=1, label="Beam size"),
        gradio.Slider(1, 10, value=1, step=1, label="Captions, of a search at most the beam size"),
        gradio.Slider(0.1, 2, value=1, step=0.1, label="Temperature of words at random"),
    ]
    outputs = [gradio.Textbox(label="Caption"), gradio.HTML(js_on_load=page.SCRIPT)]
    call = partial(caption, gradio, captioner)
    blocks = gradio.Interface(
        *(call, photograph, outputs, [[str(path)] for path in EXAMPLES]),
        additional_inputs=inputs[1:],
        submit_btn="Again",
        title="Show, Attend and Tell",
        description="A sentence about a photograph, and where the model looked for each word.",
        article="Examples (scikit-image, CC0): *chelsea*, S. van der Walt; *coffee*, R. Michetti.",
        flagging_mode="never",
        delete_cache=(60, 3600),  # each minute, photographs of an hour ago
        api_name="caption",
    )
    with blocks:
        for part in inputs:  # else only "Again" would caption
            part.change(call, inputs, outputs, trigger_mode="always_last", api_visibility="private")
    return blocks


def interrupt(*_):
    """As Ctrl-C, but once, so that the folder is removed: a closed terminal sends two signals."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def photographs_folder():
    """A temporary folder. Those that killed processes left, whose locks are free, are removed."""
    where = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())
    where.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with exclusive_lock(where / f".{FOLDER}lock", f"{where} is locked; try again", 60):
            for left in where.glob(f"{FOLDER}*"):
                with suppress(UserError, OSError), exclusive_lock(left / "lock", "", 0):
                    shutil.rmtree(left)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=FOLDER, dir=where))
            stack.enter_context(exclusive_lock(Path(folder, "lock"), "", 0))
        yield folder


def main():
    args = get_args()
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(signum, interrupt)
    with photographs_folder() as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        os.environ["no_proxy"] = "*"  # Gradio connects to its own server at the start
        try:
            socket.create_server((args.host or "127.0.0.1", args.port or 0)).close()
            import gradio  # it would retry a taken port or a foreign address for minutes
        except OSError as error:
            raise UserError(f"--host {args.host} --port {args.port}: {error}") from None
        except ImportError:
            raise UserError("app.py needs Gradio: pip install -r requirements-app.txt") from None
        model = find_model(args.model, args.checkpoint_folder, print)
        captioner = Captioner(model, args.word_map, args.device, args.amp, args.plain)
        blocks = build_page(gradio, captioner)
        address = {"server_name": args.host, "server_port": args.port, "share": False}
        blocks.launch(**address, quiet=True, prevent_thread_lock=True, max_file_size="32mb")
        print(f"Open {blocks.local_url} in a browser; Ctrl-C ends.", flush=True)
        blocks.block_thread()


if __name__ == "__main__":
    run_script(main)
