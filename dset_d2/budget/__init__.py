"""One model, any latency budget: settings, what they cost, and who chooses among them."""
