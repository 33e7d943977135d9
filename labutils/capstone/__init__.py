"""The capstone: designs of a service, judged by speed, quality, energy, fairness and privacy (chapter 13)."""
