"""Does dvc.lock belong to the code, the parameters and the results beside it? A clone can tell.

``dvc repro --dry`` stops at the first stage that it cannot look into without data, and ``dvc
status`` takes data that are not there for a change. Here only what Git tracks is looked at:
commands, parameters, code, metrics and plots against ``dvc.lock``, and what a stage read against
what the stage before it wrote. So the answer is the same with and without data.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from dvc.dependency.param import ParamsDependency
from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo
from dvc.stage import Stage

from chest.errors import ChestError

# What DVC says of a file or a parameter, for people.
STATES = {
    "modified": "has changed",
    "new": "is not in dvc.lock",
    "deleted": "is missing",
}

SHOWN = 5  # reasons that are told of a stage: one that never ran has dozens


class PipelineError(ChestError):
    """A pipeline that DVC cannot read."""


@dataclass(frozen=True)
class StaleStage:
    """A stage of which dvc.lock tells the results of something else.

    ``name`` is DVC's (``split``, ``data/dvc.yaml:draw_phantoms``); ``file`` and ``line`` say where
    it stands. ``reasons``: what is not as dvc.lock has it; ``after``: the stages with reasons that
    it comes after. One of both may be empty.
    """

    name: str
    file: str
    line: int
    reasons: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def why(self) -> str:
        """The first reasons in one line; where it has none of its own, what it comes after."""
        left = len(self.reasons) - SHOWN
        more = [f"and {left} more"] if left > 0 else []
        return "; ".join([*self.reasons[:SHOWN], *more]) or f"comes after {', '.join(self.after)}"


def stale_stages(root: str | Path = ".") -> list[StaleStage]:
    """The stale stages of every dvc.yaml of the repository in `root`, in the order of their lines.

    Raises PipelineError where DVC cannot read a pipeline, a lock file or the parameters, and where
    there is no stage.
    """
    try:
        with Repo(str(root)) as repo:
            if not repo.index.stages:
                raise PipelineError(f"{root} has no pipeline: no stage in a dvc.yaml")
            return sorted(_find(repo), key=lambda stage: (stage.file, stage.line))
    except (DvcException, OSError) as error:
        raise PipelineError(f"DVC cannot read the pipeline in {root}: {error}") from None


def _find(repo: Repo) -> Iterator[StaleStage]:
    stages = repo.index.stages
    written = {out.fs_path: out for stage in stages for out in stage.outs}
    reasons = {stage: tuple(_reasons(stage, written)) for stage in stages}
    lines = {path: _lines(path) for path in {stage.dvcfile.path for stage in stages}}
    for stage in stages:
        before = _before(stage, repo.index.graph)
        after = tuple(sorted(_name(other) for other in before if reasons[other]))
        if reasons[stage] or after:
            line = lines[stage.dvcfile.path][stage.name]
            yield StaleStage(_name(stage), _file(stage), line, reasons[stage], after)


def _before(stage: Stage, graph) -> set[Stage]:
    """All stages that come before `stage`; an edge of DVC's graph leads to one that it reads."""
    direct = set(graph.successors(stage))
    return direct.union(*(_before(other, graph) for other in direct))


def _reasons(stage: Stage, written: dict[str, Output]) -> Iterator[str]:
    """What of `stage` is not as dvc.lock has it; `written`: the outputs of all stages by path."""
    if not any(out.hash_info for out in stage.outs):
        yield "none of its outputs is in dvc.lock"
        return
    if stage.changed_stage():
        yield "its command has changed"
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency):
            yield from _changed_parameters(dep)
        elif (source := written.get(dep.fs_path)) is None or not dep.hash_info:
            yield from _changed_file(dep)
        elif dep.hash_info != source.hash_info:
            yield f"{_path(dep)} is not the one that {_name(source.stage)} wrote"
    for out in stage.outs:
        yield from _changed_file(out)


def _changed_parameters(dep: ParamsDependency) -> Iterator[str]:
    for file, keys in dep.status().items():
        if isinstance(keys, str):
            yield f"{file} {STATES[keys]}"
        else:
            yield from (f"{key} in {file} {STATES[state]}" for key, state in keys.items())


def _changed_file(file: Output) -> Iterator[str]:
    """What is wrong with a dependency or an output, if it is one that Git tracks."""
    if not file.hash_info:
        yield f"{_path(file)} {STATES['new']}"
    elif not _is_data(file):
        yield from (f"{_path(file)} {STATES[state]}" for state in file.status().values())


def _is_data(file: Output) -> bool:
    """Whether a clone lacks it, or a part of it: Git ignores the path, or what would lie in it."""
    scm = file.repo.scm
    return scm.is_ignored(file.fs_path) or scm.is_ignored(str(Path(file.fs_path) / "file"))


def _path(file: Output) -> str:
    return Path(file.fs_path).relative_to(file.repo.root_dir).as_posix()


def _file(stage: Stage) -> str:
    return Path(stage.dvcfile.path).relative_to(stage.repo.root_dir).as_posix()


def _name(stage: Stage) -> str:
    """As DVC names a stage in the root of the repository."""
    file = _file(stage)
    return stage.name if file == "dvc.yaml" else f"{file}:{stage.name}"


def _lines(path: str) -> dict[str, int]:
    """{stage: the line, from 1, on which it begins} of a dvc.yaml."""
    top = yaml.compose(Path(path).read_text(encoding="utf-8"))
    stages = {key.value: value for key, value in top.value}["stages"]
    return {key.value: key.start_mark.line + 1 for key, _ in stages.value}
