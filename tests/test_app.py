"""app.py: the page in Chromium, and what its server does with the files it gets."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from factories import ROOT

import app
from caption import Captioner

PHOTOGRAPHS = [ROOT / "docs/photo.jpg", *app.EXAMPLES]
DEFAULTS = (app.SEARCH, 5, 1, 1.0, "heat")


@pytest.fixture(scope="module")
def captioner():
    return Captioner(device="cpu")


def start_app(folder, *arguments):
    """app.py, on a computer whose other requests go through a proxy: its process and address"""
    pytest.importorskip("gradio")
    process = subprocess.Popen(
        [sys.executable, ROOT / "app.py", "--device", "cpu", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "http_proxy": "http://127.0.0.1:9"},
    )
    [address] = re.findall(r"Open (http\S+) in a browser", process.stdout.readline())
    return process, address


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running app.py: its address, its process and the folder for its temporary files"""
    folder = tmp_path_factory.mktemp("temporary")
    process, address = start_app(folder)
    yield SimpleNamespace(address=address, process=process, folder=folder)
    process.send_signal(signal.SIGTERM)
    process.wait(30)


@pytest.fixture
def ask(server):
    """`ask(path, *options)`: what the page's function answers, as another program sees it"""
    client = pytest.importorskip("gradio_client").Client(
        server.address, verbose=False, analytics_enabled=False
    )

    def ask(path, *options):
        from gradio_client import handle_file

        return client.predict(handle_file(path), *options or DEFAULTS, api_name="/caption")

    return ask


def wait_for(condition, seconds=60):
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except WebDriverException:  # the page is changing
            pass
        time.sleep(0.05)
    raise AssertionError("waited in vain")


class Visitor:
    """Somebody at the page, in Chromium."""

    def __init__(self, chromium, server):
        self.chromium = chromium
        chromium.get_log("browser"), chromium.get_log("performance")  # clears them
        chromium.get(server.address)
        wait_for(lambda: self.elements("input[type=file]"))

    def elements(self, selector):
        return self.chromium.find_elements("css selector", selector)

    def drop(self, path):
        for button in self.elements("button[aria-label*='Remove'], button[aria-label*='Clear']"):
            button.click()  # the photograph before
        box = wait_for(lambda: self.elements("button:has(> input[type=file])"))[0]
        self.chromium.execute_script(
            """
            const [box, name, base64] = arguments;
            const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
            const dropped = new DataTransfer();
            dropped.items.add(new File([bytes], name, { type: "image/jpeg" }));
            box.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true }));
        """,
            box,
            path.name,
            base64.b64encode(path.read_bytes()).decode(),
        )

    def wait_for_words(self, words):
        wait_for(lambda: [word.text for word in self.elements(".sat-word")] == words)
        wait_for(lambda: self.elements("textarea")[0].get_property("value") == " ".join(words))

    def point_at(self, index):
        """Point at a word; what the picture then shows, as a data URL"""
        from selenium.webdriver import ActionChains

        word = self.elements(".sat-word")[index]
        ActionChains(self.chromium).move_to_element(word).perform()
        wait_for(lambda: "sat-shown" in word.get_attribute("class"))
        canvas = self.elements(".sat-picture canvas")[0]
        return wait_for(
            lambda: self.chromium.execute_script(
                "return arguments[0].width > 300 && arguments[0].toDataURL()", canvas
            )
        )

    def errors(self):
        return [entry for entry in self.chromium.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize("path", PHOTOGRAPHS[:2], ids=lambda path: path.stem)
def test_a_dropped_photograph_gets_its_caption_and_its_words_light_up(
    server, chromium, captioner, path
):
    visitor = Visitor(chromium, server)
    visitor.drop(path)
    visitor.wait_for_words(captioner(path).words)
    assert len({visitor.point_at(0), visitor.point_at(1)}) == 2
    assert visitor.errors() == []
    messages = [
        json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")
    ]
    addresses = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    ours = [url for url in addresses if url.startswith(server.address)]
    assert len(ours) > 3  # the page, its script, the photograph, the question
    assert {url.partition(":")[0] for url in addresses if url not in ours} <= {"data", "blob"}


def test_the_next_photograph_and_another_view_show_their_own_attention(server, chromium, captioner):
    first, second = PHOTOGRAPHS[:2]
    words = captioner(second).words
    visitor = Visitor(chromium, server)
    visitor.drop(second)
    visitor.wait_for_words(words)
    expected = visitor.point_at(1)

    visitor = Visitor(chromium, server)
    visitor.drop(first)
    visitor.wait_for_words(captioner(first).words)
    assert visitor.point_at(1) != expected
    visitor.drop(second)
    visitor.wait_for_words(words)
    assert visitor.elements(".sat-where")[0].text.startswith("Point at a word")
    assert visitor.point_at(1) == expected
    wait_for(lambda: visitor.elements("button.label-wrap"))[0].click()  # the options
    wait_for(lambda: visitor.elements("input[value=light]"))[0].click()
    wait_for(lambda: visitor.elements(".sat[data-colours='']"))
    visitor.wait_for_words(words)
    assert visitor.point_at(1) != expected
    assert visitor.errors() == []


def test_people_who_come_at_once_get_the_captions_of_their_own_photographs(ask, captioner):
    expected = [captioner(path).text for path in PHOTOGRAPHS]
    assert len(set(expected)) == len(PHOTOGRAPHS)
    with ThreadPoolExecutor(len(PHOTOGRAPHS)) as pool:
        answers = list(pool.map(ask, PHOTOGRAPHS * 3))
    assert [text for text, _ in answers] == expected * 3


def test_a_bad_file_gets_one_line_that_names_it_and_what_is_wrong(ask, tmp_path):
    from gradio_client.exceptions import AppError

    broken = tmp_path / "holiday.jpg"
    broken.write_bytes(b"these are not pixels")
    with pytest.raises(AppError, match=r"^holiday\.jpg .*image") as error:
        ask(broken)
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


def test_a_file_beyond_the_bound_is_refused(server):
    httpx = pytest.importorskip("httpx")
    bound = app.LARGEST_MEGABYTES << 20
    statuses = [
        httpx.post(
            f"{server.address}gradio_api/upload",
            timeout=60,
            files={"files": ("large.png", bytes(size))},
        ).status_code
        for size in (bound - 1000, bound + 1000)
    ]
    assert statuses == [200, 413]


def test_it_answers_on_this_computer_only_and_leaves_no_file_behind(ask, server):
    assert server.address.startswith("http://127.0.0.1:")
    ask(PHOTOGRAPHS[0])
    assert list(server.folder.rglob("photo.jpg"))
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(30)
    assert list(server.folder.iterdir()) == []


def test_choices_of_the_page_are_those_of_the_search(captioner):
    def items(*options):
        text, html = app.caption(captioner, str(PHOTOGRAPHS[0]), *options)
        return text, html.count("<li>"), html

    best = captioner(PHOTOGRAPHS[0], beam_size=3, n_best=2)
    text, count, html = items(app.SEARCH, 3, 2, 1.0, "heat")
    assert (text, count) == (best.text, 2) and best.n_best[1][0] in html
    assert items(app.SEARCH, 2, 9, 1.0, "heat")[1] == 2  # no more than the beam
    hard = captioner(PHOTOGRAPHS[0], hard_attention=True)
    assert items(app.HARD, 5, 1, 1.0, "heat")[0] == hard.text
    assert items(app.SAMPLE, 1, 4, 2.0, "heat")[1] == 4
    assert 'data-colours=""' in items(*DEFAULTS[:-1], "light")[2]
    assert app.caption(captioner, None, *DEFAULTS) == ("", "")


def test_an_address_that_is_taken_or_not_ones_own_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            (["--port", str(port)], f"cannot listen at 127.0.0.1, port {port}: "),
            (["--host", "192.0.2.1"], "cannot listen at 192.0.2.1, port any: "),
            (["--host", "no.such.invalid"], "cannot listen at no.such.invalid, port any: "),
            (["--port", "70000"], "--port is 70000, it must be at least 1 and at most 65535"),
        ):
            done = subprocess.run(
                [sys.executable, ROOT / "app.py", *arguments],
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 2 and done.stderr.startswith(f"app.py: {message}")
            assert done.stderr.count("\n") == 1


def test_it_listens_at_an_ipv6_address_too(tmp_path):
    httpx = pytest.importorskip("httpx")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    process, address = start_app(tmp_path, "--host", "::1")
    try:
        assert address.startswith("http://[::1]:") and httpx.get(address).status_code == 200
    finally:
        process.terminate()
        process.wait(30)


def test_without_gradio_it_says_what_to_install(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError")
    done = subprocess.run(
        [sys.executable, ROOT / "app.py"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (
        2,
        "app.py: app.py needs Gradio: pip install -r requirements-app.txt\n",
    )
