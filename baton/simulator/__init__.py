"""The platform in virtual time: real policies, index, schedulers and block pools, made-up seconds.

workload ──► cluster ──► outcomes            (what arrived, when; what it got)
             │  router    the router's own index, table, policy and performance model
             │  worker    the engine's own scheduler, pool and prefix cache; a runner that
             │            computes nothing and says how long it would have taken
             └─ events    one queue of what happens when
"""
