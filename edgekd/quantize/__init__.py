"""Dialect-aware quantization: scheme from the card, calibrated start, learnt scales, lowering per runtime."""
