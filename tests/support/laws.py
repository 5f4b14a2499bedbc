"""Laws: how property tests draw their examples: the same ones every time, and no files left behind."""
from hypothesis import HealthCheck, settings

LAW = settings(derandomize=True, database=None, deadline=None, max_examples=60,
               suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])            # a busy machine is no fault of an example
