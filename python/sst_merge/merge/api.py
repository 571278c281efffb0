"""`sst_merge.merge` for Python: a merge of paths or objects, kept until it is saved."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..io.adapters import Adapter
    from ..recipe import Recipe

_TEXTS = (".json", ".yml", ".md", ".html")


class Merged:
    """A finished merge: `save` writes it, `apply` puts it on a model.

    Attributes:
        report: what `report.json` holds: evaluation, budget, patch, inputs, versions.
        folder: where it lies until it is saved, a temporary folder that goes with this object.

    Example:
        >>> merged = sst_merge.merge(model="base", safety="safety", harm=rows, benign=others, mu=1.0, folds=2, yes=True)
        >>> sorted(merged.report["patch"]["kept_energy"])[0]
        'model.layers.0.mlp.down_proj'
    """

    def __init__(self, report: dict[str, Any], home: Path):
        self.report = report
        self.folder, self._inputs = home / "out", home / "inputs"
        weakref.finalize(self, shutil.rmtree, home, ignore_errors=True)

    @property
    def adapter(self) -> Adapter:
        """The merged adapter: LoRA factors by module."""
        from ..io.adapters import load_adapter

        return load_adapter(self.folder)

    def apply(self, model: Any, name: str = "merged") -> Any:
        """Put the merged adapter on a causal language model under `name`, and return the PeftModel. ModelError where it does not fit."""
        from ..io.fit import attach

        return attach(model, name, self.adapter)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write adapter, report, model card, recipe and evidence, and in `inputs` what was given as objects. Returns the path.

        Raises OutputError where something stands there already; `force` replaces an earlier output.
        """
        from ..io.output import output_folder
        from ..io.paths import expanded

        target = expanded(folder).absolute()
        with output_folder(target, force=force) as partial:
            shutil.copytree(self.folder, partial, dirs_exist_ok=True)
            if any(self._inputs.iterdir()):
                shutil.copytree(self._inputs, partial / "inputs")
            for file in (p for p in partial.iterdir() if p.suffix in _TEXTS):
                text = file.read_text(encoding="utf-8")
                text = text.replace(str(self.folder), str(target)).replace(str(self._inputs), str(target / "inputs"))
                file.write_text(text, encoding="utf-8")
        return target

    def __repr__(self) -> str:
        from ..report import spent

        return f"Merged({len(self.report['patch']['kept_energy'])} modules; {spent(self.report)})"


def merge(
    *,
    model: Any,
    safety: Any,
    harm: Any = None,
    benign: Any = None,
    task: Any = None,
    tokenizer: Any = None,
    eval_harm: Any = None,
    eval_benign: Any = None,
    kl_budget: float | None = None,
    yes: bool = False,
    progress: bool = False,
    keep_evidence: bool = True,
    **settings: Any,
) -> Merged:
    """Merge a safety adapter into a task adapter, as `sst-merge merge` does.

    Args:
        model: a folder, or a loaded causal language model, which stays as it is; LoRA layers on it do not count.
        safety, task: adapter folders, PeftModels with one active adapter, or names of adapters on `model`. Without a task adapter the bare
            model's behaviour is kept.
        harm, benign, eval_harm, eval_benign: data files, or rows such as `{"prompt": …, "response": …}` (lists, `datasets.Dataset`).
        tokenizer: of a loaded model; by default the one of the folder or name that it was loaded from.
        kl_budget: benign KL to spend, in nats per label token (without a strength: the knee of what is measured).
        yes: go on where the inputs look like a mistake. progress: bars and notes on stderr.
        settings: further entries of a recipe (`docs/cli.md`): `mu`, `rank`, `input_filter`, `seed`, …

    Raises:
        MergeError: with what to do, for unusable inputs.

    Example:
        >>> merged = sst_merge.merge(model="base", safety="safety", harm=rows, benign=others, mu=1.0, folds=2, yes=True)
        >>> merged.save("out").name
        'out'
    """
    from ..errors import RecipeError
    from ..progress import Reporter
    from . import pipeline

    data = {"harm": harm, "benign": benign, "eval_harm": eval_harm, "eval_benign": eval_benign}
    if taken := settings.keys() & {"output", *(f"{name}_data" for name in data)}:
        raise RecipeError(
            f"{', '.join(sorted(taken))}: give harm, benign, eval_harm and eval_benign, and save() the result"
        )
    if kl_budget is not None:
        settings["kl_budget"] = kl_budget
    home = Path(tempfile.mkdtemp(prefix="sst-merge-"))
    try:
        recipe = _recipe(model, {"safety": safety, "task": task}, data, settings, home)
        report = pipeline.merge(
            recipe,
            reporter=Reporter(not progress),
            keep_evidence=keep_evidence,
            yes=yes,
            loaded=None if isinstance(model, str | Path) else _loaded(model, tokenizer),
        )
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise
    return Merged(report, home)


def _recipe(model: Any, adapters: dict[str, Any], data: dict[str, Any], settings: dict[str, Any], home: Path) -> Recipe:
    """The recipe of a merge into `home`, in whose `inputs` stands what was given as objects."""
    from ..io.borrowed import adapter_at, rows_at
    from ..recipe import Recipe

    (home / "inputs").mkdir()
    values: dict[str, Any] = {**settings, "output": home / "out"}
    values["model"] = str(model) if isinstance(model, str | Path) else _name(model)
    for name, given in adapters.items():
        if given is not None:
            values[name] = adapter_at(given, name, model, home / "inputs" / name)
    for name, given in data.items():
        if given is not None:
            values[f"{name}_data"] = rows_at(given, name, home / "inputs" / f"{name}.jsonl")
    return Recipe.parse(values, where="merge")


def _name(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "model")


def _loaded(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """A model of one's own over the same weights, and a tokenizer that may be changed."""
    import copy

    from transformers import AutoTokenizer

    from ..io.borrowed import bare
    from ..io.loading import loading
    from ..io.models import check_vocabulary, prepare_tokenizer

    network = bare(model)
    if tokenizer is None:
        with loading(_name(network)):
            tokenizer = AutoTokenizer.from_pretrained(_name(network), local_files_only=True, trust_remote_code=False)
    tokenizer = copy.deepcopy(tokenizer)
    prepare_tokenizer(tokenizer, network.config)
    check_vocabulary(_name(network), network, tokenizer)
    return network, tokenizer
