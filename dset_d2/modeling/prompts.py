"""Classes as phrases of a text, and the tokens of it that are theirs.

A text is ``[CLS] phrase . phrase . [SEP]``. It is put together from the tokens of each phrase, so
that a class's tokens are known by their places and nothing is found by comparing decoded text,
where cut words ("pottedpl") become classes that nobody asked for.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# What Grounding DINO knows by these numbers, whatever a vocabulary calls them.
SPECIAL = {"[PAD]": 0, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
BREAKS = re.compile(r"[_.?\s]+")  # a full stop or question mark would end the phrase


def clean(name: str) -> str:
    """A class's name as a phrase: "Traffic_Cone" and "TrafficCone" -> "traffic cone"."""
    return BREAKS.sub(" ", CAMEL.sub(" ", name)).strip().lower()


def phrases_of(classes: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """The cleaned phrases of each class, of which it may have several.

    Raises:
        ValueError: if there is no class, if one has no phrase, or if two have the same.
    """
    if not classes:
        raise ValueError("prompts=[] must have a phrase for each class")
    found: dict[str, int] = {}
    phrases = []
    for index, names in enumerate(classes):
        own = [clean(name) for name in ([names] if isinstance(names, str) else names)]
        if not own or not all(own):
            raise ValueError(f"prompts: {names!r} of class {index} is no phrase")
        for phrase in own:
            if found.setdefault(phrase, index) != index:
                raise ValueError(
                    f"prompts: classes {found[phrase]} and {index} have the same phrase "
                    f"{phrase!r}; give them phrases that differ"
                )
        phrases.append(list(dict.fromkeys(own)))
    return phrases


@dataclass(frozen=True)
class Prompt:
    """A text of some classes' phrases.

    Attributes:
        ids: of its T tokens.
        spans: of each phrase its class and the range of its tokens.
        num_classes: of all texts together.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, range], ...]
    num_classes: int

    def tokens(self) -> Tensor:
        """(C, T) bool: which tokens are each class's; none are of a class of other texts."""
        owned = torch.zeros(self.num_classes, len(self.ids), dtype=torch.bool)
        for label, span in self.spans:
            owned[label, span.start : span.stop] = True
        return owned

    def class_logits(self, logits: Tensor) -> Tensor:
        """Logits of tokens (..., T) as those of classes (..., C).

        A phrase's score is upstream's: the mean of its tokens' probabilities. A class's is that
        of its best phrase, and 0 (a logit of -inf) if all its phrases are in other texts.
        """
        longest = max(len(span) for _, span in self.spans)
        rows = [[*span, *[-1] * (longest - len(span))] for _, span in self.spans]
        index = torch.tensor(rows, device=logits.device)  # (P, L)
        x = logits.float()[..., index.clamp(min=0)]
        # log of the sum of p and of 1 - p, whose difference is the mean's logit to all digits.
        ends = (-F.softplus(sign * x) for sign in (-1, 1))
        hits, misses = (end.masked_fill(index < 0, -torch.inf).logsumexp(-1) for end in ends)
        phrases = hits - misses  # (..., P)
        owner = torch.tensor([label for label, _ in self.spans], device=logits.device)
        classes = phrases.new_full((*phrases.shape[:-1], self.num_classes), -torch.inf)
        return classes.scatter_reduce(-1, owner.expand_as(phrases), phrases, "amax")


def make_prompts(
    phrases: Sequence[Sequence[str]], tokenize: Callable[[str], list[int]], limit: int
) -> list[Prompt]:
    """Put phrases in order into as few texts as hold them.

    Args:
        phrases: of each class.
        tokenize: the tokens of a phrase.
        limit: most tokens of a text.

    Raises:
        ValueError: if a phrase alone exceeds the limit, or has no tokens.
    """
    first, last, stop = SPECIAL["[CLS]"], SPECIAL["[SEP]"], SPECIAL["."]
    texts: list[tuple[list[int], list[tuple[int, range]]]] = []
    for label, own in enumerate(phrases):
        for phrase in own:
            tokens = tokenize(phrase)
            if not tokens or len(tokens) + 3 > limit:
                raise ValueError(
                    f"prompts: {phrase!r} has {len(tokens)} tokens; texts of {limit} hold phrases "
                    f"of 1 to {limit - 3}"
                )
            if not texts or len(texts[-1][0]) + len(tokens) + 2 > limit:
                texts.append(([first], []))
            ids, spans = texts[-1]
            spans.append((label, range(len(ids), len(ids) + len(tokens))))
            ids += [*tokens, stop]
    return [Prompt((*ids, last), tuple(spans), len(phrases)) for ids, spans in texts]
