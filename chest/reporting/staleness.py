"""Find stages whose results in ``dvc.lock`` do not belong to the code and parameters beside it.

``dvc repro --dry --allow-missing`` asks the same of each stage, but in a clone without data it ends
at the first stage that is stale, misses a script that was deleted, and does not look into a folder
that several stages write to. So DVC's own comparison of each dependency and output is used here.
Files that Git ignores may be missing: what a stage read is then compared with what the stages
before it wrote, both by ``dvc.lock``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx
import yaml
from dvc.dependency.param import ParamsDependency
from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo
from dvc.stage import Stage
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree

from chest.core.errors import ChestError


class PipelineError(ChestError):
    """A pipeline that DVC cannot read."""


@dataclass(frozen=True)
class StaleStage:
    """A stale stage: its DVC name (``data/dvc.yaml:draw_phantoms``), where it is defined, and why.

    ``changed``: whether something of its own changed; otherwise it only follows a stale stage.
    """

    name: str
    file: str
    line: int
    reason: str
    changed: bool


def stale_stages(root: str | Path = ".") -> list[StaleStage]:
    """Return the stale stages of the DVC repository at `root`, in the order of their lines.

    Raises PipelineError if DVC cannot read the pipeline.
    """
    try:
        with Repo(str(root)) as repo:
            return sorted(_find(repo), key=lambda stage: (stage.file, stage.line, stage.name))
    except DvcException as error:
        raise PipelineError(f"DVC cannot read the pipeline: {error}") from error


def _find(repo: Repo) -> Iterator[StaleStage]:
    graph = repo.index.graph  # its edges lead from a stage to those that it depends on
    outs = {out.fs_path: out for stage in graph for out in stage.outs}
    reasons = {stage: list(_reasons(stage, outs)) for stage in graph}
    for stage, own in reasons.items():
        before = [s.addressing for s in networkx.descendants(graph, stage) if reasons[s]]
        if own or before:
            reason = "; ".join(own) or f"follows {', '.join(sorted(before))}"
            path = Path(stage.dvcfile.path)
            file = path.relative_to(repo.root_dir).as_posix()
            yield StaleStage(stage.addressing, file, _line(path, stage.name), reason, bool(own))


def _line(path: Path, name: str) -> int:
    """Return the line of a dvc.yaml, from 1, on which a stage or its foreach begins."""
    top = yaml.compose(path.read_text(encoding="utf-8"))
    stages = {key.value: value for key, value in top.value}["stages"]
    lines = {key.value: key.start_mark.line + 1 for key, _ in stages.value}
    return lines[name.partition("@")[0]]


def _reasons(stage: Stage, outs: dict[str, Output]) -> Iterator[str]:
    if not any(out.hash_info for out in stage.outs):
        yield "not in dvc.lock"
        return
    if stage.changed_stage():
        yield "its definition has changed"
    for dep in stage.deps:
        written = None if isinstance(dep, ParamsDependency) else _written(dep, outs)
        if written and written != dep.hash_info:
            yield f"{dep} is not what the stages before it wrote"
        else:
            yield from _changes(dep)
    for out in stage.outs:
        yield from _changes(out)


def _written(dep: Output, outs: dict[str, Output]) -> HashInfo | None:
    """Return the hash that the outputs of the stages before give a file or folder, if known."""
    if dep.fs_path in outs:
        return outs[dep.fs_path].hash_info
    inside = [out for path, out in outs.items() if Path(dep.fs_path) in Path(path).parents]
    if not inside or any(not out.hash_info or out.hash_info.isdir for out in inside):
        return None
    tree = Tree()
    for out in inside:
        key = Path(out.fs_path).relative_to(dep.fs_path).parts
        tree.add(key, out.meta, out.hash_info)
    tree.digest()
    return tree.hash_info


def _changes(entry: Output) -> Iterator[str]:
    """Describe how a dependency or output differs from dvc.lock, except for missing data."""
    for path, state in entry.status().items():
        if isinstance(state, dict):  # the parameters of a file
            yield from (f"{key} in {path}: {change}" for key, change in state.items())
        elif state == "modified" or state == "new" or not _is_data(entry):
            yield f"{path}: {state}"


def _is_data(entry: Output) -> bool:
    """Return whether Git ignores a file or folder, so that a clone may lack it."""
    return entry.repo.scm.is_ignored(f"{entry.fs_path}/file")
