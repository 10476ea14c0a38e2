"""The LightningModule, its optimizer, loss and callbacks."""
