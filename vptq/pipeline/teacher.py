"""What the original predicts for the text of a fine-tuning: kept on disk, or computed as it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vptq.checkpoint.reader import load_whole
from vptq.finetune_config import FinetuneConfig
from vptq.models.remote import mirror_of
from vptq.pipeline.block_pass import Told
from vptq.pipeline.states import KeptTeacher, states_folder
from vptq.pipeline.team import Team
from vptq.pipeline.tune_job import TuneJob
from vptq.pipeline.tune_models import Pair

Logits = Callable[[list[int]], Tensor]  # numbers of sequences -> (len(numbers), seq_len, vocab_size)


class Teacher:
    """The original of a pair. Its predictions are made once, and then serve every training of the run.

    Args: as for `WholeTuning`.
    """

    def __init__(self, pair: Pair, config: FinetuneConfig, tokens: Tensor, job: TuneJob, team: Team) -> None:
        self.pair, self.config, self.tokens, self.job, self.team = pair, config, tokens, job, team
        self._logits: Logits | None = None

    def units(self) -> float:
        """What `told` is told: tokens that go forward through a block."""
        cached = self.config.teacher == "cached" and self._logits is None
        return float(self.tokens.numel()) * len(self.pair.original.blocks) if cached else 0.0

    def logits(self, told: Told) -> Logits:
        """The original's logits of some sequences, by their numbers."""
        if self._logits is None:
            self._logits = self._live() if self.config.teacher == "live" else self._kept(told)
        return self._logits

    def forget(self) -> None:
        """Free what it holds in memory."""
        self._logits = None

    def _live(self) -> Logits:
        pair = self.pair
        model = load_whole(str(pair.original.folder), str(pair.device), trust_remote_code=pair.trust_remote_code)

        @torch.no_grad()
        def live(numbers: list[int]) -> Tensor:
            return model(input_ids=self.tokens[numbers].to(pair.device), use_cache=False).logits

        return live

    def _kept(self, told: Told) -> Logits:
        left = self.units()

        def heard(tokens: int) -> None:
            nonlocal left
            left -= tokens
            told("the original's predictions", tokens)

        if self.team.rank > 0:
            self.team.wait()  # the first process makes them
        teacher = KeptTeacher.make(self.pair.original_runner(), self.tokens, self._folder(), heard)
        if self.team.rank == 0:
            self.team.wait()
        told("the original's predictions", left)
        return teacher

    def _folder(self) -> Path:
        """Where what the original computes is kept: in the run folder, unless that would be copied to its URL."""
        if self.config.cache_dir or mirror_of(self.job.folder) is not None:
            return states_folder(self.config.cache_dir)
        return self.job.work / "states"
