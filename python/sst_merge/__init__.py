"""SST-Merge: add a safety adapter to a language model without paying the safety tax.

Data → Fisher passes → safety subspace → merged PEFT adapter → report, and the baselines to hold it against.
"""
