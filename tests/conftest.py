import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """
    One thread computes in one order, whatever else the machine does; and small models wait for
    their threads more than they compute.
    """
    torch.set_num_threads(1)
