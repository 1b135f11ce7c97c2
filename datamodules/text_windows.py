"""Windows of tokens: splits text into a calibration and a held-out part, and cuts or draws windows from them."""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

SEPARATOR = "\n\n"
"""Between two documents that are joined."""

Tokenise = Callable[[str], Tensor]


class Windows(Dataset):
    """The rows of a tensor (windows, seq_len), each with its index."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return {"input_ids": self.windows[index], "index": index}


def split_by_document(
    documents: Sequence[str], tokenise: Tokenise, num_tokens: int, generator: Generator
) -> tuple[list[int], Tensor]:
    """Hold documents out, from the end of a random order, until they hold `num_tokens` tokens.

    Returns:
        Indices of the documents left, in random order, and the tokens of those held out, joined: at least `num_tokens`.
        Only the documents held out are tokenised.

    Raises:
        ValueError: If all documents together hold fewer tokens.
    """
    order = torch.randperm(len(documents), generator=generator).tolist()
    heldout, tokens, num_apart = [], torch.empty(0, dtype=torch.long), 0
    while len(tokens) < num_tokens and order:
        heldout.append(order.pop())
        num_apart += len(tokenise(documents[heldout[-1]]))
        if num_apart >= num_tokens or not order:  # joined they may have fewer: the joint is tokenised too
            tokens = tokenise(SEPARATOR.join(documents[index] for index in sorted(heldout)))
    if len(tokens) < num_tokens:
        raise _too_little("the held-out windows", num_tokens, len(tokens))
    return order, tokens


def split_by_position(tokens: Tensor, num_tokens: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Cut a stream of tokens before its last `num_tokens`.

    Raises:
        ValueError: If less than one window would be left.
    """
    if len(tokens) < num_tokens + seq_len:
        raise _too_little("the held-out windows and one calibration window", num_tokens + seq_len, len(tokens))
    return tokens[: len(tokens) - num_tokens], tokens[len(tokens) - num_tokens :]


def consecutive_windows(tokens: Tensor, seq_len: int, argument: str) -> Tensor:
    """Cut a stream into consecutive windows (number, seq_len) and drop what remains at its end.

    Raises:
        ValueError: If the stream is shorter than one window.
    """
    if len(tokens) < seq_len:
        raise _too_little("one test window", seq_len, len(tokens), argument)
    number = len(tokens) // seq_len
    return tokens[: number * seq_len].view(number, seq_len)


def draw_from_stream(tokens: Tensor, seq_len: int, number: int, generator: Generator, argument: str = "source") -> Tensor:
    """Draw windows (number, seq_len) that start anywhere in a stream; they may overlap.

    Raises:
        ValueError: If the stream is shorter than one window.
    """
    if len(tokens) < seq_len:
        raise _too_little("one window", seq_len, len(tokens), argument)
    starts = torch.randint(len(tokens) - seq_len + 1, (number,), generator=generator)
    return torch.stack([tokens[start : start + seq_len] for start in starts.tolist()])


def draw_from_documents(
    documents: Sequence[str], order: list[int], tokenise: Tokenise, seq_len: int, number: int, generator: Generator
) -> Tensor:
    """Draw windows (number, seq_len), each from one document of more than `seq_len` tokens.

    Documents are taken in the given random `order`, and tokenised only when their turn comes. If there are too few long
    documents for `number` windows, the remaining windows are drawn from these documents again.

    Raises:
        ValueError: If no document is long enough.
    """
    windows, long, longest = [], [], 0
    for index in order:
        if len(windows) == number:
            break
        tokens = tokenise(documents[index])
        longest = max(longest, len(tokens))
        if len(tokens) > seq_len:
            long.append(tokens)
            windows.append(draw_from_stream(tokens, seq_len, 1, generator))
    if not long:
        raise ValueError(
            f"Argument `source`: `sampling: document` needs a document of {seq_len + 1} tokens, the longest of "
            f"{len(order)} calibration documents has {longest}. Give longer ones, lower `seq_len` or set "
            "`sampling: joined`."
        )
    while len(windows) < number:
        choice = torch.randint(len(long), (), generator=generator).item()
        windows.append(draw_from_stream(long[choice], seq_len, 1, generator))
    return torch.cat(windows)


def _too_little(use: str, needed: int, found: int, argument: str = "source") -> ValueError:
    remedy = "lower `seq_len` or `num_heldout`" if argument == "source" else "lower `seq_len`"
    return ValueError(
        f"Argument `{argument}` expected at least {needed} tokens, for {use}, but got {found}; give more text, or {remedy}."
    )
