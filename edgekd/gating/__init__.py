"""The gate for any two models: ONNX files or bundles, with no run of edgekd behind them (docs/gate.md)."""
