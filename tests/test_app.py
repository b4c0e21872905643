"""app.py: the page in Chromium, and what its server does with the files it gets."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from factories import ROOT

import app
from caption import Captioner
from utils import run_script

PHOTOGRAPHS = [ROOT / "docs/photo.jpg", *app.EXAMPLES]


@pytest.fixture(scope="module")
def captioner():
    return Captioner(device="cpu")


def test_choices_of_the_page_are_those_of_the_search(captioner):
    search, hard, sample = app.SEARCHES
    path = str(PHOTOGRAPHS[0])

    def ask(*options):
        text, html = app.caption(None, captioner, path, *options)
        return text, html.count("<li"), html

    best = captioner(path, beam_size=3, n_best=2)
    text, count, html = ask(search, 3, 2.7, 1.0)  # another program may send fractions
    assert (text, count) == (best.text, 2) and best.n_best[1][0] in html
    assert "show evidence" in html
    assert ask(search, 2, 9, 1.0)[1] == 2  # no more than the beam
    scores = [-captioner(path, hard_attention=hard).score for hard in (False, True)]
    assert f"{scores[0]:.3f}" in ask(search, 5, 1, 1.0)[2]
    assert f"{scores[1]:.3f}" in ask(hard, 5, 1, 1.0)[2] and scores[0] != scores[1]
    assert ask(sample, 1, 4, 1e-3)[1] == 4
    assert ask(sample, 1, 1, 1e-3)[0] == captioner(path, beam_size=1).text
    assert app.caption(None, captioner, None, search, 5, 1, 1.0) == ("", "")
    with pytest.raises(ValueError, match=r"^nowhere\.jpg not found$"):
        gradio = SimpleNamespace(Error=lambda message, print_exception: ValueError(message))
        app.caption(gradio, captioner, "folder/nowhere.jpg", search, 5, 1, 1.0)


def test_what_keeps_the_page_from_starting_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    environment = os.environ.copy()

    def start(*arguments, **variables):
        monkeypatch.setattr(os, "environ", environment | variables)
        monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
        with pytest.raises(SystemExit) as end:
            run_script(app.main)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("app.py: ") and error.count("\n") == 1
        return error

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}" in start("--port", port)
    assert "192.0.2.1" in start("--host", "192.0.2.1")
    assert "no.such.invalid" in start("--host", "no.such.invalid")
    assert "--port is 70000" in start("--port", "70000")
    assert "192.0.2.1" in start(GRADIO_SERVER_NAME="192.0.2.1")
    assert "--port: invalid int value: 'http'" in start(GRADIO_SERVER_PORT="http")
    assert "/dev/null" in start(GRADIO_TEMP_DIR="/dev/null/x")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install -r requirements-app.txt" in start()


def test_photographs_of_killed_servers_are_removed_and_those_of_running_ones_are_not(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    killed = "import app, os\nwith app.photographs_folder() as folder:\n    os._exit(9)"
    subprocess.run([sys.executable, "-c", killed], cwd=ROOT)
    assert len(list(tmp_path.iterdir())) == 1
    with app.photographs_folder() as first, app.photographs_folder() as second:
        assert sorted(map(str, tmp_path.iterdir())) == sorted([first, second])
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """app.py, where other requests go through a proxy: its address, process, temporary folder"""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("temporary")
    proxy = {"http_proxy": "http://127.0.0.1:9"}
    env = os.environ | proxy | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "app.py", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    process.stdout.readline()  # which model
    [address] = re.findall(r"Open (http\S+) in a browser", process.stdout.readline())
    yield SimpleNamespace(address=address, process=process, folder=folder)
    process.send_signal(signal.SIGTERM)
    process.wait(30)


@pytest.fixture
def ask(server):
    """`ask(path, **options)`: what the page's function answers to another program"""
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(server.address, verbose=False, analytics_enabled=False)

    def ask(path, **options):
        file = gradio_client.handle_file(path)
        return client.predict(photograph=file, **options, api_name="/caption")

    return ask


DROP = """
const [box, name, base64] = arguments;
const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
const dropped = new DataTransfer();
dropped.items.add(new File([bytes], name, { type: "image/jpeg" }));
box.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true }));
"""


@pytest.mark.slow
def test_dropped_photographs_get_their_captions_and_their_words_light_up(
    server, chromium, captioner
):
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    def wait_for(condition):  # errors: while the page is changing
        waiting = WebDriverWait(chromium, 60, 0.05, ignored_exceptions=[WebDriverException])
        return waiting.until(lambda _: condition())

    def elements(selector):
        return chromium.find_elements("css selector", selector)

    def wait_for_words(words):
        wait_for(lambda: [word.text for word in elements(".sat-word")] == words)
        wait_for(lambda: elements("textarea")[0].get_property("value") == " ".join(words))

    def point_at(word):
        """The address of the heat map that is then shown"""
        ActionChains(chromium).move_to_element(word).perform()
        wait_for(lambda: "sat-shown" in word.get_attribute("class"))
        [heat] = elements(".sat-looking .sat-heat.sat-shown")
        wait_for(lambda: heat.value_of_css_property("opacity") == "1")
        return heat.get_attribute("src")

    chromium.get_log("browser"), chromium.get_log("performance")  # clears them
    chromium.get(server.address)
    wait_for(lambda: elements("input[type=file]"))
    seen = []
    for path in (*PHOTOGRAPHS[:2], PHOTOGRAPHS[0]):
        for button in elements("button[aria-label*='Remove'], button[aria-label*='Clear']"):
            button.click()  # the photograph before
        box = wait_for(lambda: elements("button:has(> input[type=file])"))[0]
        content = base64.b64encode(path.read_bytes()).decode()
        chromium.execute_script(DROP, box, path.name, content)
        wait_for_words(captioner(path).words)
        assert elements(".sat-where")[0].text.startswith("Point at a word")
        seen.append(tuple(map(point_at, elements(".sat-word")[:2])))
    assert len({*seen[0], *seen[1]}) == 4 and seen[2] == seen[0]
    assert all(entry["level"] != "SEVERE" for entry in chromium.get_log("browser"))
    entries = chromium.get_log("performance")
    messages = [json.loads(entry["message"])["message"] for entry in entries]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    addresses = [params["request"]["url"] for params in sent]
    ours = [url for url in addresses if url.startswith(server.address)]
    assert len(ours) > 3  # the page, its script, the photograph, the question
    assert {url.partition(":")[0] for url in addresses if url not in ours} <= {"data", "blob"}


@pytest.mark.slow
def test_people_who_come_at_once_get_the_captions_of_their_own_photographs(ask, captioner):
    expected = [captioner(path).text for path in PHOTOGRAPHS]
    assert len(set(expected)) == len(PHOTOGRAPHS)
    with ThreadPoolExecutor(len(PHOTOGRAPHS)) as pool:
        answers = list(pool.map(ask, PHOTOGRAPHS * 3))
    assert [text for text, _ in answers] == expected * 3
    assert ask(PHOTOGRAPHS[0], words=app.SEARCHES[0], captions=2.5)[1].count("<li") == 2


@pytest.mark.slow
def test_a_bad_file_gets_one_line_that_names_it_and_a_large_one_is_refused(ask, server, tmp_path):
    from gradio_client.exceptions import AppError

    httpx = pytest.importorskip("httpx")
    broken = tmp_path / "holiday.jpg"
    broken.write_bytes(b"these are not pixels")
    with pytest.raises(AppError, match=r"^holiday\.jpg .*image") as error:
        ask(broken)
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)
    for megabytes, status in ((31, 200), (33, 413)):
        files = {"files": ("large.png", bytes(megabytes << 20))}
        url = f"{server.address}gradio_api/upload"
        assert httpx.post(url, timeout=60, files=files).status_code == status


@pytest.mark.slow
def test_it_answers_on_this_computer_only_and_leaves_no_file_behind(ask, server):
    assert server.address.startswith("http://127.0.0.1:")
    ask(PHOTOGRAPHS[0])
    assert list(server.folder.rglob("photo.jpg"))
    for _ in range(2):  # as when a terminal is closed
        server.process.send_signal(signal.SIGHUP)
    server.process.wait(30)
    assert list(server.folder.iterdir()) == []
