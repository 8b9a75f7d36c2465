"""edgekit: from a trained model to a fleet you can trust.

Public packages: ``compiler`` optimizes, ``bundle`` and ``repository`` pack and publish, ``agent`` runs on the device,
``fleet`` watches the devices. The command line is ``edgekit``.
"""

__version__ = "0.1.0"
