"""A dataset of images, and the function that makes batches of them. Both can leave out images that cannot be read."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.image_sources import Images, UnreadableImage


class ImageDataset(Dataset):
    """Transformed images at some positions of a source. With `skip`, an image that cannot be read is None."""

    def __init__(self, source: Images, positions: Sequence[int], labels: list[int], transform: Callable, skip: bool) -> None:
        self.source, self.positions, self.labels = source, positions, labels
        self.transform, self.skip = transform, skip

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict[str, Tensor | int] | None:
        position = self.positions[index]
        try:
            image = self.source.read(position)
        except UnreadableImage:
            if self.skip:
                return None
            raise
        return {"image": self.transform(image), "label": self.labels[position], "index": index}


class Collate:
    """Make a batch of items. Those that are None are left out, and counted with `skip`; the batch may have no samples."""

    def __init__(self, size: tuple[int, int, int], skip: bool) -> None:
        self.size, self.skip = size, skip

    def __call__(self, items: list[dict[str, Tensor | int] | None]) -> dict[str, Tensor]:
        kept = [item for item in items if item is not None]
        batch = {
            "image": torch.stack([item["image"] for item in kept]) if kept else torch.empty(0, *self.size),
            "label": torch.tensor([item["label"] for item in kept], dtype=torch.long),
            "index": torch.tensor([item["index"] for item in kept], dtype=torch.long),
        }
        return batch | {"skipped": torch.tensor(len(items) - len(kept))} if self.skip else batch
