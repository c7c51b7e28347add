"""Ways of asking about Emoji World that no training has: dataset/emoji_words.py has those that training shows."""

UNSEEN = {
    "en": {
        "what": (
            "List the objects.", "What is shown in this image?", "Name the things that you see.",
            "Tell me which objects you can see.", "What are the things in this picture?",
        ),
        "at": (
            "What object do you see at the {}?", "Which thing can you see at the {}?",
            "What is shown at the {} of the image?", "Look at the {}: what is there?",
        ),
        "where": (
            "Where can you see the {}?", "Which part of the picture shows the {}?", "Tell me the place of the {}.",
            "Where in this image can I find the {}?",
        ),
        "count": (
            "Count the objects.", "How many objects can you see?", "What number of things is in this image?",
            "Tell me the number of objects.",
        ),
        "colour": (
            "Tell me the background colour.", "Which colour is the background of this picture?",
            "What is the ground's colour?", "What colour is behind the objects?",
        ),
        "yesno": (
            "Is there {a} in this picture?", "Does the image show any {}?", "Do you see {a} here?",
            "Can you find any {} in the image?",
        ),
    },
    "zh": {
        "what": ("这张图片里有哪些东西？", "列出图里的物体。", "你能看到哪些东西？", "图片中有什么？"),
        "at": ("{}的物体是什么？", "图片的{}有什么东西？", "在{}能看到什么？", "告诉我{}是什么。"),
        "where": ("{}在图片的哪里？", "{}在图里哪个位置？", "告诉我{}在哪里。", "哪里有{}？"),
        "count": ("图片里有几样东西？", "数一数物体。", "你能看到多少样东西？", "告诉我有几样东西。"),
        "colour": ("这张图的背景是什么颜色？", "告诉我背景颜色。", "图片的底色是什么颜色？", "物体后面是什么颜色？"),
        "yesno": ("这张图片里有{}吗？", "你能在图中找到{}吗？", "图片中有没有{}？", "看得到{}吗？"),
    },
}  # fmt: skip
