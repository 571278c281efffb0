"""From a recipe to an adapter: what is asked for, the producer of what is known, the algebra, the pipeline."""
