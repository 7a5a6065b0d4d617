"""Packed models as ONNX files of standard operators, which stock onnxruntime runs.

```python
from bellbox.interop import onnx

onnx.export(model, (example,), "model.onnx")
```
"""

from bellbox.interop.onnx.exporting import Weights, export, export_model

__all__ = ["Weights", "export", "export_model"]
