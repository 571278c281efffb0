"""The instrument: what SST-Merge costs, beside its physical floor and beside what others do on the same shapes."""
