"""A model in use: the one generation engine, the sampler, the cache, and the policy."""
