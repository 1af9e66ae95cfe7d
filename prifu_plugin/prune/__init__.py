"""Dead-channel elimination: capture, facts, plan, rewrite, verify."""
