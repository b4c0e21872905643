"""A function of many items, computed by worker processes."""

from torch.utils.data import DataLoader, Dataset

from modeling.workers import load_batches, start_worker


class _Results(Dataset):
    def __init__(self, function, items):
        self.function, self.items = function, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.function(self.items[i])


def map_in_processes(function, items, workers):
    """
    Yield function(item) of each item, in order. Fewer than 2 workers: computed in this process.
    The processes end with this one; UserError if one was killed.
    """
    options = {"num_workers": workers, "prefetch_factor": 4} if workers > 1 else {}
    # Few items at a time, since an interrupt waits for them; as lists, since tensors would be sent
    # by way of /dev/shm, which may be small.
    results = DataLoader(
        _Results(function, items),
        batch_size=4,
        collate_fn=list,
        worker_init_fn=start_worker,
        **options,
    )
    for several in load_batches(results):
        yield from several
