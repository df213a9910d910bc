"""A vision-language model behind an OpenAI-compatible endpoint as the judge of pictures.

    vlm_yes_no      P(yes) / (P(yes) + P(no)) of the answer's first token: one token a picture, and smooth
    vlm_rubric      a labelled number between low and high, as (x - low) / (high - low)
    unified_reward  the three axes of UnifiedReward 2.0 (2503.05236), mean of (x - 1) / 4; or one "Final Score" (1.5)
    pref_grpo       the better of two pictures; the runtime shows both orders and takes win rates (2508.20751)

An answer that cannot be read makes its sample invalid; public code takes 0, the batch's mean, half a win or a random
number for it. Requests of a batch run side by side; results keep its order. Of a video, frames 0, stride, 2 stride ... are
shown in one message. The judge answers at temperature 0, but a server need not give equal answers to equal questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ClassVar, Literal

from flowrl.rewards.endpoint import Endpoint, EndpointError, Reply
from flowrl.rewards.media import BOTH, check_positive, frames, scored
from flowrl.rewards.parsing import axis_scores, labelled_number, preferred, shortened, unit_range, yes_probability

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Pictures = Sequence[npt.NDArray[np.uint8]]

YES_NO = "Does this picture show the following, and all of it? Text: {prompt}\nAnswer with yes or no only."
RUBRIC = (
    "Text: {prompt}\nRate from {low:g} to {high:g} how well the picture shows this text and how well it is made.\n"
    "Give your reasons in a sentence or two, then end with the line\nFinal Score: <number>"
)
AXES = ("Alignment Score", "Coherence Score", "Style Score")
THREE_AXES = (
    "Text: {prompt}\nRate the picture on three scales from 1 to 5: how well it agrees with the text, how sound and coherent "
    "it is, how good its style is. Answer with three lines:\n"
    "Alignment Score (1-5): <number>\nCoherence Score (1-5): <number>\nStyle Score (1-5): <number>"
)
FINAL = (
    "Text: {prompt}\nRate from 1 to 5 how well the picture agrees with the text and how good it looks. End with the line\n"
    "Final Score: <number>"
)
PAIR = (
    "Text: {prompt}\nTwo pictures were made for this text, Image 1 and then Image 2. Which one agrees with the text and looks "
    "better? End with one of the lines\nImage 1 is better\nImage 2 is better\nTie"
)


class _Judge:
    """Asks side by side, keeps order, turns what cannot be read into errors."""

    name: ClassVar[str] = ""
    media = BOTH
    minimum = 0.0
    backbone = "vlm"
    deterministic = False
    licence = "that of the model behind the endpoint"

    def __init__(self, endpoint: Endpoint, question: str, concurrency: int, stride: int) -> None:
        check_positive(self.name, "concurrency", concurrency)
        check_positive(self.name, "stride", stride)
        if "{prompt}" not in question:
            raise UserError(f"{self.name}: question has no {{prompt}}, so the judge would not see it; put it in")
        self.endpoint, self.question = endpoint, question
        self.concurrency, self.stride = concurrency, stride

    def ask(
        self, questions: Sequence[str], pictures: Sequence[Pictures], read: Callable[[Reply], dict[str, float]],
        max_tokens: int = 512, top_logprobs: int = 0,
    ) -> tuple[list[dict[str, float]], list[str | None], list[str | None]]:  # fmt: skip
        """Numbers by name, error and shortened answer of each question; no numbers where there is an error."""

        def one(index: int) -> tuple[dict[str, float], str | None, str | None]:
            try:
                reply = self.endpoint.chat(questions[index], pictures[index], max_tokens, top_logprobs)
            except EndpointError as error:
                return {}, f"{self.name}: {error}", None
            try:
                return read(reply), None, shortened(reply.text)
            except ValueError as error:
                return {}, f"{self.name}: unreadable answer: {error}", shortened(reply.text)

        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="flowrl-judge") as pool:
            told = list(pool.map(one, range(len(questions))))
        return [t[0] for t in told], [t[1] for t in told], [t[2] for t in told]

    def shown(self, batch: RewardBatch) -> list[Pictures]:
        """The pictures of each sample: one, or the chosen frames of its video."""
        return [list(frames(batch.images[i : i + 1], self.stride)[0]) for i in range(len(batch))]

    def rate(
        self,
        batch: RewardBatch,
        read: Callable[[Reply], dict[str, float]],
        max_tokens: int = 512,
        top_logprobs: int = 0,
    ) -> RewardResult:
        """One question a sample; the score is read's "score", its other numbers are components."""
        import numpy as np

        questions = [fill(self.question, prompt) for prompt in batch.prompts]
        numbers, errors, details = self.ask(questions, self.shown(batch), read, max_tokens, top_logprobs)
        names = dict.fromkeys(name for row in numbers for name in row)
        columns = {name: np.array([row.get(name, np.nan) for row in numbers], np.float32) for name in names}
        scores = columns.pop("score", np.full(len(batch), np.nan, np.float32))
        return scored(scores, columns, details, errors)


class YesNo(_Judge):
    """P(yes) in [0, 1] of a question about picture and prompt.

    question: a text with {prompt}; top_logprobs: how many first tokens the server lists (20 is vLLM's limit); the others
    as in ``endpoint.Endpoint``; concurrency: requests at a time; stride: of video frames.
    """

    name = "vlm_yes_no"
    scope = "sample"

    def __init__(
        self, url: str, model: str, question: str = YES_NO, key_variable: str = "", top_logprobs: int = 20,
        concurrency: int = 8, stride: int = 4, timeout: float = 60.0, *, deadline: float = 180.0, retries: int = 3,
    ) -> None:  # fmt: skip
        check_positive(self.name, "top_logprobs", top_logprobs)
        endpoint = Endpoint(url, model, key_variable, timeout, deadline, retries)
        super().__init__(endpoint, question, concurrency, stride)
        self.top_logprobs = top_logprobs

    def score(self, batch: RewardBatch) -> RewardResult:
        """Ask about finished pictures or videos."""
        return self.rate(batch, lambda r: {"score": yes_probability(r.first_token)}, 1, self.top_logprobs)


class Rubric(_Judge):
    """(x - low) / (high - low) in [0, 1], x the number that the judge writes after ``label``.

    question: a text with {prompt} that asks for that line; the rest as in ``YesNo``. Component "raw" is x.
    """

    name = "vlm_rubric"
    scope = "sample"

    def __init__(
        self, url: str, model: str, question: str = "", label: str = "Final Score", low: float = 1.0,
        high: float = 5.0, key_variable: str = "", concurrency: int = 8, *, stride: int = 4, timeout: float = 60.0,
        deadline: float = 180.0, retries: int = 3,
    ) -> None:  # fmt: skip
        if not low < high:
            raise UserError(f"{self.name}: low is {low}, high {high}; use low < high")
        asked = question or RUBRIC.replace("{low:g}", f"{low:g}").replace("{high:g}", f"{high:g}")
        endpoint = Endpoint(url, model, key_variable, timeout, deadline, retries)
        super().__init__(endpoint, asked, concurrency, stride)
        self.label, self.low, self.high = label, low, high

    def score(self, batch: RewardBatch) -> RewardResult:
        """Ask about finished pictures or videos."""

        def read(reply: Reply) -> dict[str, float]:
            raw = labelled_number(reply.text, self.label, self.low, self.high)
            return {"score": unit_range(raw, self.low, self.high), "raw": raw}

        return self.rate(batch, read)


class UnifiedReward(_Judge):
    """UnifiedReward's two ways of answering, read as verl-omni (axes) and flow_grpo (final) do.

    version: "axes" for 2.0, score = mean over alignment, coherence and style of (x - 1) / 4, with the three as
    components; "final" for 1.5, score = x / 5. question: "" for one of our own words; the checkpoint's own question gives
    its published figures. An axis that is missing makes the sample invalid.
    """

    name = "unified_reward"
    scope = "sample"
    backbone = "unified-reward"
    licence = "MIT (CodeGoat24/UnifiedReward)"

    def __init__(
        self, url: str, model: str, version: Literal["axes", "final"] = "axes", question: str = "",
        key_variable: str = "", concurrency: int = 8, stride: int = 4, timeout: float = 60.0, *,
        deadline: float = 180.0, retries: int = 3,
    ) -> None:  # fmt: skip
        if version not in ("axes", "final"):
            raise UserError(f"{self.name}: version is {version!r}; use axes (2.0) or final (1.5)")
        endpoint = Endpoint(url, model, key_variable, timeout, deadline, retries)
        super().__init__(endpoint, question or (THREE_AXES if version == "axes" else FINAL), concurrency, stride)
        self.version = version

    def score(self, batch: RewardBatch) -> RewardResult:
        """Ask about finished pictures or videos."""

        def read(reply: Reply) -> dict[str, float]:
            if self.version == "final":
                return {"score": labelled_number(reply.text, "Final Score", 1, 5) / 5}
            axes = axis_scores(reply.text, AXES, 1, 5)
            named = {name.split()[0].lower(): value for name, value in axes.items()}
            return {"score": sum(unit_range(value, 1, 5) for value in named.values()) / len(named)} | named

        return self.rate(batch, read)


class PrefGrpo(_Judge):
    """Pair judge of Pref-GRPO: 1 where the first picture is the better one, 0 where the second is, 1/2 for a tie.

    The runtime makes win rates within groups of it and shows each pair in both orders, since judges like a place. An
    unreadable verdict leaves the pair out. question: a text with {prompt} about Image 1 and Image 2.
    """

    name = "pref_grpo"
    scope = "pair"

    def __init__(
        self, url: str, model: str, question: str = PAIR, key_variable: str = "", concurrency: int = 8,
        stride: int = 4, timeout: float = 60.0, *, deadline: float = 180.0, retries: int = 3,
    ) -> None:  # fmt: skip
        endpoint = Endpoint(url, model, key_variable, timeout, deadline, retries)
        super().__init__(endpoint, question, concurrency, stride)

    def compare(self, first: RewardBatch, second: RewardBatch) -> RewardResult:
        """Row by row, how much better ``first`` is, in [0, 1]."""
        import numpy as np

        both = [[*a, *b] for a, b in zip(self.shown(first), self.shown(second), strict=True)]
        questions = [fill(self.question, prompt) for prompt in first.prompts]
        numbers, errors, details = self.ask(questions, both, lambda r: {"score": preferred(r.text)})
        scores = np.array([row.get("score", np.nan) for row in numbers], np.float32)
        return scored(scores, None, details, errors)


def fill(question: str, prompt: str) -> str:
    """Put a prompt in its place; braces in the prompt mean nothing."""
    return question.replace("{prompt}", prompt)
