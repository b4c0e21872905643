import os
import shutil

import pytest
import torch
from factories import write_scenes

from modeling import field_of_view

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """
    One thread always computes in the same order, and for small models several threads spend more
    time waiting than computing. TEST_THREADS=2 shows that no test depends on it.
    """
    torch.set_num_threads(int(os.environ.get("TEST_THREADS", 1)))


@pytest.fixture(scope="session", autouse=True)
def one_noise_image():
    """Of most tests' encoders it does not matter where exactly they look, but how long it takes."""
    field_of_view.NOISE_IMAGES = 1


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """22 training, 6 validation and 6 test scenes, features cached by the first run."""
    return write_scenes(tmp_path_factory.mktemp("data"), 22, 6, 6)


@pytest.fixture(scope="session")
def chromium():
    if not CHROMIUM or not DRIVER:
        pytest.skip(
            "no chromium and chromedriver on this machine; "
            "Debian: apt-get install chromium chromium-driver"
        )
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # The sandbox needs rights that containers lack; these pages are our own.
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()
