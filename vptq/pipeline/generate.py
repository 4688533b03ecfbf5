"""Let a model write on: text as it comes, and how fast it came."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vptq.checkpoint.reader import load_whole
from vptq.data import load_tokenizer
from vptq.errors import UsageError
from vptq.models.architecture import resolve_folder
from vptq.nn.vquant_linear import cache_weights
from vptq.pipeline.decode import COLDEST, StaticDecoder, make_decoder

# Settings of a folder's generation_config that `generate` of transformers follows and a captured step doesn't know.
# Each with the value that changes nothing, beside None.
LEFT_TO_TRANSFORMERS: dict[str, Any] = {
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0,
    "min_new_tokens": 0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "bad_words_ids": [],
    "forced_bos_token_id": None, "forced_eos_token_id": None, "suppress_tokens": [], "begin_suppress_tokens": [],
    "sequence_bias": {}, "stop_strings": [], "guidance_scale": 1.0, "exponential_decay_length_penalty": None,
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: most tokens to write. temperature: 0 for the likeliest token; above, draws are from logits over it.
        top_p: draws are among the likeliest tokens that have this probability together. seed: of the draws.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """What was written, and how fast.

    Attributes:
        prompt_seconds: until the first token was there. seconds: for all tokens after it.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first; NaN where there is only one."""
        return (self.new_tokens - 1) / self.seconds if self.new_tokens > 1 and self.seconds > 0 else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        speed = self.tokens_per_second
        return asdict(self) | {"tokens_per_second": speed if speed == speed else None}


class Writer:
    """A model in memory, whole, with its tokenizer.

    Args:
        model_name: folder or hub name, original, dequantized or packed; None for the demo model.
        cache_bytes: most bytes of dequantized weights of packed linears that are kept.
        compiled: on a GPU, whether the step that writes a token goes through torch.compile.
    """

    def __init__(
        self,
        model_name: str | None = None,
        *,
        device: str | None = None,
        cache_bytes: float = 0,
        compiled: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.model = load_whole(model_name, device, trust_remote_code=trust_remote_code)
        if cache_bytes:  # else what loading made ready would be made again
            cache_weights(self.model, limit=cache_bytes)
        self.tokenizer = load_tokenizer(resolve_folder(model_name), trust_remote_code)
        self._compiled = compiled
        self._decoder: StaticDecoder | None = None
        self._captures = self.model.device.type == "cuda" and not self._left_to_transformers()

    @property
    def context(self) -> int | None:
        """Most tokens the model takes, prompt and answer together."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def encode(self, prompt: str) -> Tensor:
        """The tokens of a text to be continued: (1, n) int64."""
        return self._checked(self.tokenizer(prompt, return_tensors="pt").input_ids)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> Tensor:
        """The tokens of a conversation, by the model's own template: (1, n) int64.

        Args:
            messages: each with `role` and `content`.
        Raises:
            UsageError: the tokenizer has no chat template.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(
                "this model's tokenizer has no chat template", hint="leave out --chat: the prompt is continued as it is"
            )
        text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return self._checked(self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids)

    def write(self, tokens: Tensor, sampling: Sampling, show: Callable[[str], None] | None = None) -> Written:
        """Go on from tokens (1, n) int64. show: called with each piece of text as it comes."""
        most = sampling.max_new_tokens
        if self.context is not None:
            most = min(most, self.context - tokens.shape[1])
        stream = _Stream(self.tokenizer, show)
        torch.manual_seed(sampling.seed)
        decoder = self._decoder_for(tokens.shape[1] + most, sampling)
        stream.begin()
        if decoder is None:
            self._generate(tokens, most, sampling, stream)
        else:
            self._decode(decoder, tokens, most, stream)
        first = stream.times[1] if len(stream.times) > 1 else stream.times[0]
        return Written(
            text=stream.text,
            prompt_tokens=tokens.shape[1],
            new_tokens=stream.count,
            prompt_seconds=first - stream.times[0],
            seconds=stream.times[-1] - first,
        )

    def _generate(self, tokens: Tensor, most: int, sampling: Sampling, stream: _Stream) -> None:
        """By `generate` of transformers."""
        settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > COLDEST:
            settings = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        padding = self.tokenizer.pad_token_id
        with torch.inference_mode():
            self.model.generate(
                tokens.to(self.model.device),
                attention_mask=torch.ones_like(tokens).to(self.model.device),
                max_new_tokens=most,
                streamer=stream,
                pad_token_id=self.tokenizer.eos_token_id if padding is None else padding,
                num_beams=1,  # whatever the folder's generation_config says: one answer can be shown as it comes
                num_return_sequences=1,
                **settings,
            )

    def _decode(self, decoder: StaticDecoder, tokens: Tensor, most: int, stream: _Stream) -> None:
        """By captured steps: the GPU is at work on the next token while this one is shown."""
        last = self._last_tokens()
        stream.put(tokens)
        decoder.start(tokens)
        for number in range(most):
            with torch.cuda.device(self.model.device):
                token = decoder.token.to("cpu", non_blocking=True)
                there = torch.cuda.Event()
                there.record()
            if number + 1 < most:
                decoder.step()
            there.synchronize()
            stream.put(token)
            if int(token) in last:
                break
        stream.end()

    def _decoder_for(self, length: int, sampling: Sampling) -> StaticDecoder | None:
        """The decoder of the answer before where it can write this one as well, else a new one."""
        if not self._captures:
            return None
        if self._decoder is None or not self._decoder.fits(length, sampling.temperature, sampling.top_p):
            length = max(length, 0 if self._decoder is None else 2 * self._decoder.length)  # a conversation grows
            length = length if self.context is None else min(length, self.context)
            self._decoder = None  # its memory first
            self._decoder = make_decoder(self.model, length, sampling.temperature, sampling.top_p, self._compiled)
            self._captures = self._decoder is not None
        torch.manual_seed(sampling.seed)  # capturing draws as well
        return self._decoder

    def _left_to_transformers(self) -> bool:
        settings = getattr(self.model, "generation_config", None)
        return any(getattr(settings, name, None) not in (None, idle) for name, idle in LEFT_TO_TRANSFORMERS.items())

    def _last_tokens(self) -> set[int]:
        """After which nothing is written."""
        said = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        said = self.tokenizer.eos_token_id if said is None else said
        return set(said) if isinstance(said, list | tuple) else set() if said is None else {int(said)}

    def _checked(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        if not count:
            raise UsageError("the prompt is empty", hint="give some text to go on from")
        if self.context is not None and count >= self.context:
            raise UsageError(
                f"the prompt has {count:,} tokens, and the model takes {self.context:,}, its answer included",
                hint="shorten the prompt",
            )
        return tokens


class _Stream:
    """What `generate` calls with the prompt, then with every token: decodes what can't change any more."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None] | None) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.text = ""
        self.count = 0
        self.times: list[float] = []
        self._line: list[int] = []  # tokens since the last line's end: a text of any length takes the same time a token
        self._shown = ""  # of that line
        self._prompt_seen = False

    def begin(self) -> None:
        self.times.append(time.perf_counter())

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._line += value.flatten().tolist()
        self.count += value.numel()
        self.times.append(time.perf_counter())
        text = self._decoded()
        if text.endswith("\ufffd") or not text.startswith(self._shown):
            return  # half of a character, or a tokenizer that changes its mind: the next token has the rest
        self._say(text)
        if text.endswith("\n"):
            self._line, self._shown = [], ""

    def end(self) -> None:
        self._say(self._decoded())

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self._line, skip_special_tokens=True))

    def _say(self, text: str) -> None:
        new, self._shown = text[len(self._shown) :], text
        self.text += new
        if new and self.show is not None:
            self.show(new)
