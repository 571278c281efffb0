"""SST-Merge: add a safety adapter to a language model without paying the safety tax.

Data → one reading → safety subspace → merged PEFT adapter → report, and the baselines to hold it against.

    >>> import sst_merge
    >>> merged = sst_merge.merge(model=model, task="task", safety="safety", harm=rows, benign=others, kl_budget=0.02)  # doctest: +SKIP
    >>> merged.save("out")  # doctest: +SKIP
"""

from sst_merge.merge import Merged, merge

__all__ = ["Merged", "merge"]
