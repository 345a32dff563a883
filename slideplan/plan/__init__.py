"""The shared language: machine, model, policy, task graph, plan, timeline. No torch, no simpy."""
