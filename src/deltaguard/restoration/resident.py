"""The aligned model in memory, kept from one fine-tune to the next with what it predicts and answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

from deltaguard.chat.conversations import Conversation
from deltaguard.curvature.blocks import UncutError
from deltaguard.device import find_device
from deltaguard.errors import DeltaguardError
from deltaguard.files import read_file
from deltaguard.models.canonical import part_of
from deltaguard.models.mirror import loadable, output_files
from deltaguard.progress import Event, Progress, ignore
from deltaguard.reports.text import size
from deltaguard.restoration.acceptance import Rule
from deltaguard.restoration.aligned import SharedInputError
from deltaguard.restoration.candidate import Candidate, CandidateModel
from deltaguard.restoration.job import Job
from deltaguard.restoration.layers import known_store
from deltaguard.restoration.looks import (
    Examiner,
    Requests,
    how_asked,
    keep_answers,
    kept_answers,
    make_judge,
)
from deltaguard.restoration.safety_kl import SafetyMeter
from deltaguard.restoration.streamed import StreamedCandidate
from deltaguard.restoration.trial import Trial


@dataclass
class Resident:
    """What is kept in memory for trials of one aligned model, with one store and one configuration.

    The next fine-tune finds the model loaded, with its predictions, if it has the aligned model's tensors and
    its output the configuration, tokenizer and chat template of the fine-tune before, byte for byte. For any
    other the aligned model is loaded anew, in the place of the one that was kept. So nothing that is measured
    depends on what was measured before.
    """

    _meter: SafetyMeter | None = None
    _run_as: str = ""
    _examiner: Examiner | None = None

    def candidate(
        self,
        trial: Trial,
        tasks: Sequence[Conversation] = (),
        requests: Sequence[Conversation] = (),
        *,
        report: Progress = ignore,
    ) -> Candidate:
        """Give a candidate that fits into memory: the model as a whole, or one block after another.

        Args:
            trial: the layers.
            tasks: conversations of which the aligned model's likelihood is wanted too.
            requests: conversations of which the beginnings of the aligned model's answers are.
            report: told which of them it is.

        Raises:
            DeltaguardError: it cannot be loaded, or does not fit into memory.
        """
        if trial.footprint.by_blocks:
            try:
                return self._streamed(trial, tasks, requests, report)
            except UncutError as error:
                report(Event("measure", 0, 1, f"the model cannot be taken block by block: {error}"))
        return self.loaded(trial, tasks, requests)

    def _streamed(
        self,
        trial: Trial,
        tasks: Sequence[Conversation],
        requests: Sequence[Conversation],
        report: Progress,
    ) -> StreamedCandidate:
        # What was loaded for another is of no use beside it.
        self._meter = None
        found = trial.footprint
        said = f"the model takes {size(found.whole)} as a whole, more than {size(found.limit)}"
        report(Event("measure", 0, 1, f"{said}: block by block, prices a pass: {found.at_once}"))
        with loadable(_files(trial)) as output:
            return StreamedCandidate.open(trial, output, tasks, requests, report=report)

    def loaded(
        self, trial: Trial, tasks: Sequence[Conversation] = (), requests: Sequence[Conversation] = ()
    ) -> CandidateModel:
        """Load the aligned model, or take the one kept, with its predictions on held-out conversations.

        In float32 whatever the checkpoint's dtype: rounding logits to half precision changes predictions by
        more than the safety KL that is looked for. Candidates are run and asked with the very files that the
        output will have.

        Args:
            trial: the layers.
            tasks: conversations of which the aligned model's likelihood is wanted too.
            requests: conversations of which the beginnings of the aligned model's answers are.

        Raises:
            DeltaguardError: it cannot be loaded, or does not fit into memory.
        """
        job, config, files = trial.job, trial.config, _files(trial)
        store, run_as, serves_others = known_store(job), _hash(files), _has_the_same_tensors(job)
        # What fails half-way is not kept.
        meter, self._meter = self._meter, None
        if meter is not None and serves_others and run_as == self._run_as and not (tasks or requests):
            meter = meter.for_another(job.aligned, job.finetuned)
        else:
            # Two models at once might not fit.
            del meter
            with loadable(files) as output:
                meter = SafetyMeter.open(
                    job.aligned,
                    job.finetuned,
                    store.held_out,
                    tasks=tasks,
                    requests=requests,
                    whole_tokens=config.whole_tokens,
                    output=output,
                    device=find_device(config.device),
                    dtype=torch.float32,
                    batch_size=store.provenance.batch_size,
                    max_length=store.provenance.max_length,
                )
        if serves_others:
            self._meter, self._run_as = meter, run_as
        return CandidateModel.of(trial, meter, len(store.held_out))

    def examined(
        self, trial: Trial, rule: Rule, requests: Requests, report: Progress
    ) -> tuple[Candidate, Examiner]:
        """Give a candidate, and ask the aligned model what it will be asked, unless the answers are known.

        Args:
            trial: the layers.
            rule: says what is acceptable.
            requests: what is asked.
            report: told how the model is taken, and where its answers cannot be kept for the next run.

        Raises:
            DeltaguardError: there are too few requests, or as `candidate` and `Examiner.of`.
        """
        rule.require(len(requests.harmful), len(requests.harmless))
        known = self._examiner
        if known is not None and (known.rule, known.requests) == (rule, requests):
            return self.candidate(trial, report=report), known
        identity, config = trial.job.aligned_identity, trial.config
        # Before anybody is asked: it may not be there, and so for no fine-tune.
        try:
            judge = make_judge(config)
        except DeltaguardError as error:
            raise SharedInputError(str(error)) from error
        made_with = how_asked(config.device, config.whole_tokens)
        answers = kept_answers(identity, requests, made_with)
        candidate = self.candidate(trial, (), requests.all if answers is None else (), report=report)
        if answers is None:
            answers = tuple(candidate.aligned_openings)
            try:
                keep_answers(identity, requests, made_with, answers)
            except DeltaguardError as error:
                report(Event("look", 0, 1, f"the aligned model's answers are not kept: {error}"))
        tells_refusals = config.judge.tells_refusals
        self._examiner = Examiner.of(rule, requests, judge, answers, tells_refusals=tells_refusals)
        return candidate, self._examiner

    def release(self) -> None:
        """Give up the model and the judge, so that others have room; the model's answers are in the cache."""
        self._meter = self._examiner = None


def _files(trial: Trial) -> dict[str, Path]:
    """Find the files that candidates are run with, which are those of the output."""
    job, config = trial.job, trial.config
    is_adapter = config.output_format == "adapter"
    return output_files(job.aligned, job.finetuned, config_from=config.config_from, adapter=is_adapter)


def _hash(files: Mapping[str, Path]) -> str:
    """Hash what decides how an output is run and asked."""
    digest = sha256()
    for path, file in sorted(files.items()):
        if part_of(path) is not None:
            digest.update(f"{path} {sha256(read_file(file)).hexdigest()}\n".encode())
    return digest.hexdigest()


def _has_the_same_tensors(job: Job) -> bool:
    """Whether a loaded aligned model holds a place for every fine-tuned tensor, and no other."""
    sources = (job.aligned.tensors, job.finetuned.tensors)
    one, other = ({name: info.shape for name, info in tensors.items()} for tensors in sources)
    return one == other
