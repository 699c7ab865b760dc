"""The measured side llama.cpp, for generation: the same weights in a GGUF file, and the same prompts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from minilora.backend import peak_memory_bytes
from minilora.benchmark.job import Figures, Job, read_job_rows
from minilora.benchmark.worker import Work, serve


class Generation:
    """The rows of a job in as many slots of llama.cpp's server, asked from the same process."""

    def __init__(self, job: Job) -> None:
        import xllamacpp

        self.prompts, self.new_tokens = [row.tokens for row in read_job_rows(job)], job.new_tokens
        params = xllamacpp.CommonParams()
        params.model.path = job.model
        params.n_gpu_layers, params.n_parallel = 0, len(self.prompts)
        params.n_ctx = len(self.prompts) * (max(map(len, self.prompts)) + job.new_tokens + 32)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job.threads
        self.server = xllamacpp.Server(params)
        self.pool = ThreadPoolExecutor(len(self.prompts))

    def warm_up(self) -> None:
        self.continued(4)

    def reset(self) -> None:
        """Do nothing, because a run changes nothing."""

    def run(self) -> Figures:
        self.continued(self.new_tokens)
        return {}

    def continued(self, count: int) -> None:
        """Continue every prompt by `count` tokens, all at the same time."""
        wanted = {"max_tokens": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        for answer in self.pool.map(
            lambda tokens: self.server.handle_completions({"prompt": tokens} | wanted), self.prompts
        ):
            assert answer["usage"]["completion_tokens"] == count

    def judge(self) -> Figures:
        return {}


def load(job: Job) -> Work:
    return Generation(job)


if __name__ == "__main__":
    serve(load, peak_memory_bytes)
