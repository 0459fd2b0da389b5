"""The paper's tables, trained again and compared with the published figures; their miniature; the demo."""
