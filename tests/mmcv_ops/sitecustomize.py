"""On the PYTHONPATH of a child process: Python runs this first."""

import mmcv_ext_standin

mmcv_ext_standin.install()
