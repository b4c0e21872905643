"""
A page to try the model in a browser: drop, paste or snap a photograph.

    pip install -r requirements-app.txt
    python app.py                   # prints the page's address, on this computer only
    python app.py --model BEST_checkpoint_NAME.pth.tar --port 7860
    python app.py --host 0.0.0.0    # for other computers too

Photographs stay on this computer, for at most an hour, and are removed when the program ends.
"""

import os
import signal
import socket
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from caption import Captioner
from checkpoints import add_model_options, find_model
from utils import Number, Parser, UserError, add_device_options, run_script
from visualization import page

EXAMPLES = sorted((Path(__file__).parent / "docs" / "examples").glob("*.jpg"))
CREDITS = (
    "The examples come with scikit-image (CC0): *chelsea* by Stefan van der Walt, *coffee* "
    "by Rachel Michetti."
)
LARGEST_MEGABYTES = 32
LARGEST_BEAM = 10
CHECK_SECONDS, KEEP_SECONDS = 60, 3600  # how often old photographs are looked for, and their age
SEARCH, HARD, SAMPLE = SEARCHES = (
    "most probable",
    "most probable, with hard attention",
    "at random",
)


def get_args(argv=None):
    parser = Parser(description="A page to try the model in a browser.")
    add_model_options(parser.add_argument_group("model"))
    add = parser.add_argument_group("address").add_argument
    add("--host", default="127.0.0.1", help="0.0.0.0: let other computers in")
    add(
        "--port",
        type=Number(int, least=1, most=65535),
        help="the first free one from 7860 on if not given",
    )
    add_device_options(parser.add_argument_group("device"))
    return parser.parse_args(argv)


def caption(captioner, path, words, beam_size, n_best, temperature):
    """
    The caption of a photograph, and the HTML of the view in which each word shows where the model
    looked; two empty strings if there is no photograph. UserError if it is not readable.

    words: one of SEARCHES; n_best: captions, at most beam_size where they are searched for
    """
    if path is None:
        return "", ""
    if words == SAMPLE:
        options = {"n_best": n_best, "sample": True, "temperature": temperature}
    else:
        options = {"n_best": min(n_best, beam_size), "hard_attention": words == HARD}
    captioned = captioner(path, beam_size=beam_size, **options)
    view = page.view(captioned, "h3", page.HINT)
    return captioned.text, f"<style>{page.STYLE}</style>{view}"


def build_page(captioner, gr):
    """The Gradio page of a Captioner; gr: the package, which only this program needs"""

    def answer(*values):
        try:
            return caption(captioner, *values)
        except UserError as error:
            message = str(error).replace(str(values[0]), os.path.basename(values[0]))
            raise gr.Error(message, print_exception=False) from None

    with gr.Blocks(
        title="Show, Attend and Tell",
        analytics_enabled=False,
        delete_cache=(CHECK_SECONDS, KEEP_SECONDS),
    ) as blocks:
        gr.Markdown(
            "# Show, Attend and Tell\nA sentence about your photograph, and where the "
            "model looked for each word."
        )
        with gr.Row():
            with gr.Column(scale=2):
                photograph = gr.Image(
                    label="Photograph",
                    type="filepath",
                    height=280,
                    sources=["upload", "clipboard", "webcam"],
                )
                # The upload as it is: our own reader says what is wrong with it.
                photograph.preprocess = lambda upload: upload and upload.path
                gr.Examples([[str(path)] for path in EXAMPLES], photograph, label="Examples")
                with gr.Accordion("Options", open=False):
                    words = gr.Radio(SEARCHES, value=SEARCH, label="Words")
                    beam_size = gr.Slider(1, LARGEST_BEAM, value=5, step=1, label="Beam size")
                    n_best = gr.Slider(
                        1,
                        LARGEST_BEAM,
                        value=1,
                        step=1,
                        label="Captions",
                        info="of a search, at most the beam size",
                    )
                    temperature = gr.Slider(
                        0.1, 2, value=1, step=0.1, label="Temperature", visible=False
                    )
                    again = gr.Button("Again")
            with gr.Column(scale=3):
                text = gr.Textbox(label="Caption", interactive=False, buttons=["copy"], lines=1)
                view = gr.HTML(js_on_load=page.SCRIPT)
        gr.Markdown(CREDITS)
        words.change(
            lambda chosen: (
                gr.Slider(visible=chosen != SAMPLE),
                gr.Slider(visible=chosen == SAMPLE),
            ),
            words,
            [beam_size, temperature],
            api_visibility="private",
        )
        gr.on(
            [
                photograph.change,
                again.click,
                words.change,
                *[slider.release for slider in (beam_size, n_best, temperature)],
            ],
            answer,
            [photograph, words, beam_size, n_best, temperature],
            [text, view],
            trigger_mode="always_last",
            api_name="caption",
        )
    return blocks


def check_address(host, port):
    """UserError unless this computer can listen there; Gradio would try for minutes"""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port or 0), family=family).close()
    except OSError as error:
        raise UserError(
            f"cannot listen at {host}, port {port or 'any'}: {error.strerror}; pass "
            f"another --host or --port"
        ) from None


def main():
    args = get_args()
    check_address(args.host, args.port)
    # Gradio asks its own server whether it is there, which a proxy would not know.
    direct = [
        os.environ.get("no_proxy", os.environ.get("NO_PROXY")),
        "localhost",
        "127.0.0.1",
        args.host,
    ]
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": ",".join(filter(None, direct)),
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is removed
    with tempfile.TemporaryDirectory(prefix="show-attend-tell-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            import gradio as gr
        except ImportError:
            raise UserError("app.py needs Gradio: pip install -r requirements-app.txt") from None
        model = find_model(args.model, args.checkpoint_folder, partial(print, file=sys.stderr))
        blocks = build_page(Captioner(model, args.word_map, args.device, args.amp, args.plain), gr)
        fonts = ["system-ui", "sans-serif"]  # Gradio's own come from another server
        host = f"[{args.host}]" if ":" in args.host else args.host
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=args.port,
            quiet=True,
            share=False,
            prevent_thread_lock=True,
            max_file_size=LARGEST_MEGABYTES << 20,
            footer_links=[],
            theme=gr.themes.Default(font=fonts, font_mono=["monospace"]),
        )
        print(f"Open {address} in a browser; Ctrl-C ends.", flush=True)
        try:
            while True:  # signal.pause() is not on every system
                time.sleep(KEEP_SECONDS)
        finally:
            blocks.close(verbose=False)


if __name__ == "__main__":
    run_script(main)
