"""The paper's tables, trained again and set beside the published figures; in miniature; and the demo."""
