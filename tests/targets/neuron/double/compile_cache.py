"""libneuronxla.neuron_cc_cache as optimum-neuron's `hub_neuronx_cache` uses it; a folder."""

import os
from pathlib import Path


class CacheUrl:
    def __init__(self, url):
        self.url = url

    @classmethod
    def get_cache_url(cls, cache_dir=None):
        return cls(cache_dir or os.environ["NEURON_COMPILE_CACHE_URL"])


class CompileCache:
    def __init__(self, cache_url):
        self.cache_url, self.cache_path = cache_url, cache_url.url

    def get_cache_dir_with_cache_key(self, key):
        return f"{self.cache_path}/{key}"

    def exists(self, path):
        return os.path.exists(path)

    def upload_string_to_file(self, path, text):
        Path(path).write_text(text)


class CompileCacheFs(CompileCache):
    pass


class CompileCacheS3(CompileCache):
    pass


def create_compile_cache(cache_url):
    return CompileCacheFs(cache_url)
