"""Ways of asking about Emoji World that no training has: dataset/emoji_words.py has those that training shows.

Most were written by somebody who had not read those.
"""

UNSEEN = {
    "en": {
        "what": (
            "List the objects.", "What is shown in this image?", "Name the things that you see.",
            "Tell me which objects you can see.", "What are the things in this picture?",
            "Name every object in this picture.", "Which things can be seen here?",
            "Please list all the items that were drawn.", "What does this image show?",
            "Tell me what has been sketched here.", "What are the drawings in the picture of?",
            "Could you identify everything in the image?", "I would like the names of all the things shown.",
        ),
        "at": (
            "What object do you see at the {}?", "Which thing can you see at the {}?",
            "What is shown at the {} of the image?", "Look at the {}: what is there?", "What is drawn at the {}?",
            "Name the object in the {} position.", "Which thing occupies the {} section of the picture?",
            "Tell me what sits at the {}.", "Looking at the {}, what do you see?",
            "What does the {} part of the image show?", "Which item has been placed in the {} cell?",
            "Please identify the drawing at the {}.",
        ),
        "where": (
            "Where can you see the {}?", "Which part of the picture shows the {}?", "Tell me the place of the {}.",
            "Where in this image can I find the {}?", "In which part of the picture would I see the {}?",
            "Tell me the position of the {}.", "Which section of the image contains the {}?",
            "Where has someone drawn the {}?", "Please point out the location of the {}.",
            "What place in the picture does the {} have?", "Where should I look for the {}?",
        ),
        "count": (
            "Count the objects.", "How many objects can you see?", "What number of things is in this image?",
            "Tell me the number of objects.", "Count the objects, please.",
            "What is the total number of items shown?", "Give me the number of drawings here.",
            "How many separate sketches can you see?", "How many objects does the image contain?",
            "Can you tell me how many items were drawn?", "The picture holds how many things altogether?",
        ),
        "colour": (
            "Tell me the background colour.", "Which colour is the background of this picture?",
            "What is the ground's colour?", "What colour is behind the objects?",
            "Which colour fills the space behind the drawings?", "Name the background colour of this image.",
            "Tell me which colour lies behind the objects.", "On what colour were these things drawn?",
            "Which colour was chosen for the backdrop?", "Please say what colour the picture's background has.",
        ),
        "yesno": (
            "Is there {a} in this picture?", "Does the image show any {}?", "Do you see {a} here?",
            "Can you find any {} in the image?", "Can you see {a} here?", "Did someone draw {a} in this image?",
            "Do you notice any {} among the drawings?", "Would I find {a} in this picture?",
            "Does {a} appear anywhere in the image?", "Does one of the drawings show {a}?",
            "Has {a} been included in the picture?",
        ),
    },
    "zh": {
        "what": (
            "这张图片里有哪些东西？", "列出图里的物体。", "你能看到哪些东西？", "图片中有什么？",
            "这张图里都有哪些东西？", "请列出画面中的所有物品。", "图上画的是什么？", "你能在图片里看到些什么？",
            "说出图中每样东西的名称。", "这幅画里出现了哪些物体？", "请告诉我这里画了什么。",
            "图片展示的东西分别叫什么？",
        ),
        "at": (
            "{}的物体是什么？", "图片的{}有什么东西？", "在{}能看到什么？", "告诉我{}是什么。", "{}画的是什么？",
            "请说出{}那个东西的名称。", "位于{}的是哪样物品？", "图片的{}有什么？", "看一下{}，那里是什么东西？",
            "哪个物体在画面的{}？", "告诉我{}的图案是什么。", "在{}你看到了什么？",
        ),
        "where": (
            "{}在图片的哪里？", "{}在图里哪个位置？", "告诉我{}在哪里。", "哪里有{}？", "图中的{}位于什么地方？",
            "我在画面的哪个位置能找到{}？", "{}画在图片的哪一块？", "你能指出{}在什么方位吗？",
            "图片的哪个部分是{}？", "想找{}的话，该往哪儿看？",
        ),
        "count": (
            "图片里有几样东西？", "数一数物体。", "你能看到多少样东西？", "告诉我有几样东西。",
            "图里一共有多少样东西？", "请数一数画中的物品。", "这张图片画了几个物体？", "画面上的东西总数是多少？",
            "你看到了几样东西？", "告诉我图中物体的数量。", "这里总共有几个图案？", "这幅画包含多少件物品？",
        ),
        "colour": (
            "这张图的背景是什么颜色？", "告诉我背景颜色。", "图片的底色是什么颜色？", "物体后面是什么颜色？",
            "请说出这张图的底色。", "图片的底色是哪一种？", "这些东西画在什么颜色的底上？", "告诉我画面背景的颜色。",
            "物品后面是什么颜色？", "这幅画用了哪种颜色作背景？", "图中的背景呈现什么颜色？",
        ),
        "yesno": (
            "这张图片里有{}吗？", "你能在图中找到{}吗？", "图片中有没有{}？", "看得到{}吗？", "这张图片中有{}吗？",
            "画面上有没有画{}？", "请问这里面有{}吗？", "这些东西当中有没有{}？", "你看看，图上有{}没有？",
            "这幅画里是否有{}？", "在图中能找到{}吗，有还是没有？",
        ),
    },
}  # fmt: skip
