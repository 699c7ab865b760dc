"""Settings of every test: Hypothesis draws the same examples on every run, as many as a laptop has patience for."""

from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "minilora",
    derandomize=True,
    deadline=None,  # times on a shared machine say nothing
    max_examples=100,
    database=None,
    print_blob=False,
    report_multiple_bugs=False,  # the smallest failure is enough
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow],
)
# `pytest --hypothesis-profile=thorough` looks at many more examples, other ones each time.
settings.register_profile("thorough", settings.get_profile("minilora"), derandomize=False, max_examples=1000)
# Mutation testing runs them once for each mutant: fewer examples, and what fails need not be made smaller.
settings.register_profile(
    "mutation", settings.get_profile("minilora"), max_examples=20, phases=(Phase.explicit, Phase.generate)
)
settings.load_profile("minilora")
