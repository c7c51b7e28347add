"""Emoji World in words: what can be said of a scene, asked about it, and answered, in English and Chinese."""

from random import Random

from dataset.emoji_world import Scene, Thing, concepts, name

KINDS = ("what", "at", "where", "count", "colour", "yesno")
RELATIONS = ("beside", "larger")  # kinds that not every scene can be asked
PLACES = {
    "en": ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"),
    "zh": ("左上", "上方", "右上", "左边", "中间", "右边", "左下", "下方", "右下"),
}
COLOURS = {
    "en": ("white", "grey", "red", "orange", "yellow", "green", "blue", "purple"),
    "zh": ("白色", "灰色", "红色", "橙色", "黄色", "绿色", "蓝色", "紫色"),
}
NUMBERS = {
    "en": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "zh": ("一", "两", "三", "四", "五", "六", "七", "八", "九"),
}
YES_NO = {"en": ("yes", "no"), "zh": ("有", "没有")}
NAMES_APART, REMARKS_APART = {"en": ", ", "zh": "、"}, {"en": ", ", "zh": "，"}
DIRECTIONS = {"en": ("left of", "right of", "above", "below"), "zh": ("左边", "右边", "上面", "下面")}
LARGER = 1.25  # times as large is larger
# Each kind of question in many words, because a model that knows two ways of asking understands no third; and each word
# of asking (see, find, show, number, name) in several kinds, because else it takes that word for the kind.
# {}: the thing or the place; {a}: the thing with its article. dataset/exam/emoji_wordings.py has others, which no
# training shows.
QUESTIONS = {
    "en": {
        "what": (
            "What is in the picture?", "What do you see?", "Which things are in the image?", "What can you see here?",
            "Name everything in the picture.", "List what you see.", "What does the image show?",
            "Which objects are there?", "Tell me what is there.", "What things are shown?", "Please list all things.",
            "What items are in the scene?", "Say what you can see.", "What has been drawn here?",
            "Which items does the picture contain?", "Can you name all objects in the image?",
            "Give me the names of the things.", "What is there to see?", "Which things can be found here?",
            "What can be found in the picture?", "What objects can you spot?", "Can you list the things?",
            "Show me what there is.", "What do you find in the image?", "Tell me the names of all items.",
            "What are the items called?", "Which things does this picture show?", "What is drawn in this picture?",
            "Please tell me everything that you see.", "Look at the picture. What is in it?",
        ),
        "at": (
            "What is at the {}?", "Which thing is at the {}?", "What do you see at the {}?",
            "Which object is at the {}?", "What is in the {} of the picture?", "Name the thing at the {}.",
            "Tell me what is at the {}.", "What can be seen at the {}?", "Which item lies at the {}?",
            "Please name the object at the {}.", "Can you tell what is at the {}?",
            "Say what the {} of the image shows.", "What thing is there at the {}?", "What has been drawn at the {}?",
            "Look at the {}. What do you see?", "Which thing does the {} show?", "What can you find at the {}?",
            "What do you find at the {} of the picture?", "Show me what is at the {}.",
            "Tell me the name of the thing at the {}.", "What can you spot at the {}?", "At the {}, what do you see?",
            "What does this picture show at the {}?", "Which thing can be found at the {}?",
            "Give me the name of the object at the {}.", "What is drawn at the {} of this image?",
            "Look at the picture. What is at the {}?", "What is there at the {}?",
        ),
        "where": (
            "Where is the {}?", "In which place is the {}?", "Where do you see the {}?",
            "Where in the picture is the {}?", "Tell me where the {} is.", "Find the {}.",
            "In which part of the image is the {}?", "Where can I find the {}?",
            "Please tell me where to find the {}.", "Can you see where the {} is?", "What is the place of the {}?",
            "Say where the {} lies.", "Look for the {}. Where is it?", "Which place has the {}?",
            "Show me where the {} is.", "Where has the {} been drawn?", "Where does the picture show the {}?",
            "In this picture, where is the {}?", "Where is the {} to be found?", "Can you show me the {}?",
            "Where can the {} be seen?", "Can you find the {}? Where is it?", "Where can you spot the {}?",
            "At which place do you see the {}?", "Give me the place of the {}.", "Name the place where the {} is.",
            "Look at the picture. Where is the {}?", "Where did they draw the {}?",
        ),
        "count": (
            "How many things are there?", "How many things do you see?", "How many objects are in the picture?",
            "How many things does the image show?", "Count the things.", "What is the number of things?",
            "Tell me how many things there are.", "How many objects can be seen?", "Please count all items.",
            "Can you count the things in the scene?", "How many items are shown?", "Say how many things you see.",
            "What is the count of things here?", "How many things has the picture?", "Give me the number of things.",
            "How many are there?", "How many things can you find?", "How many objects can you spot?",
            "What is the number of items in the scene?", "Tell me the number of things in the image.",
            "Can you tell how many there are?", "Find out how many things there are.",
            "How many things are in this picture?", "How many items does this picture show?",
            "Look at the picture. How many things are there?", "Name the number of objects.",
            "How many different things can be found?", "Show me how many things there are.",
        ),
        "colour": (
            "What colour is the ground?", "Which colour is behind the things?", "What is the colour of the ground?",
            "What colour is the background?", "Which colour does the background have?",
            "Tell me the colour of the ground.", "What colour do you see behind the things?",
            "Name the background colour.", "Please name the colour of the ground.",
            "Can you tell the colour of the background?", "Say which colour the ground has.",
            "Which colour is the ground?", "What is the background's colour?",
            "On what colour of ground are the things?", "Give me the colour of the background.",
            "Which colour fills the background?", "Which colour do you find behind everything?",
            "Which colour can you see in the background?", "Can you see the colour of the ground?",
            "Show me the background colour.", "What colour has been used for the ground?",
            "How is the background coloured?", "Look at the picture. What colour is the ground?",
            "In which colour is the background drawn?", "The ground has which colour?",
            "What colour does this picture have behind the things?", "Find the colour of the background.",
        ),
        "yesno": (
            "Is there any {}?", "Do you see any {}?", "Is there {a} here?", "Can you see {a}?",
            "Does the picture show {a}?", "Is {a} in the image?", "Can any {} be seen?", "Is the {} there?",
            "Please tell me if there is {a}.", "Can you tell if {a} is there?", "Does the scene have {a}?",
            "Has {a} been drawn here?", "Is any {} shown?", "Look for {a}. Is there one?",
            "Are you able to see any {}?", "Does the picture contain {a}?", "Is there {a}?", "Can you find {a}?",
            "Can {a} be found here?", "Can you spot any {}?", "Tell me whether the picture shows {a}.",
            "Is there {a} to be seen?", "Did they draw {a}?", "Is {a} among the things?",
            "In this picture, is there {a}?", "Do you find any {} here?", "Is one of the things {a}?",
            "Look at the picture. Is there {a}?", "Could you find {a} here?", "Does this image have any {}?",
            "Say whether {a} is there.",
        ),
        "beside": (
            "What is {} the {}?", "Which thing is {} the {}?", "Tell me what is {} the {}.",
            "What do you see {} the {}?", "Name the thing {} the {}.", "What lies {} the {}?",
            "Which object can you find {} the {}?", "What can be seen {} the {}?", "Look {} the {}: what is there?",
            "Show me what is {} the {}.",
        ),
        "larger": (
            "Which is larger, the {} or the {}?", "What is bigger, the {} or the {}?",
            "Which one is larger, the {} or the {}?", "Of the {} and the {}, which is larger?",
            "Tell me which is bigger, the {} or the {}.", "Which is the larger one, the {} or the {}?",
            "Is the {} or the {} larger?", "Is the {} or the {} the bigger one?",
            "Compare the {} and the {}: which is larger?", "What is larger here, the {} or the {}?",
        ),
    },
    "zh": {
        "what": (
            "图中有什么？", "你看到了什么？", "图片里有什么东西？", "画面中有哪些东西？", "列出图中的东西。",
            "说出你看到的东西。", "这张图里有什么？", "图里有哪些物体？", "图上画了什么？", "请列出所有东西。",
            "画面里画了哪些物体？", "你看见什么了？", "请说出图里的东西。", "图片里都有什么？", "能说出所有物体吗？",
            "图里的东西叫什么？", "这里有什么？", "你能看见什么？", "图里能找到什么？", "你发现了哪些东西？",
            "画里有哪些物体？", "告诉我图里有什么。", "看看图，里面有什么？", "你能认出哪些东西？",
            "图片展示了什么？", "能看到的东西有哪些？", "图里的物体都是什么？",
        ),
        "at": (
            "{}是什么？", "{}有什么？", "{}的东西是什么？", "图中{}是什么？", "你在{}看到了什么？", "{}画了什么？",
            "说出{}的东西。", "图片{}有什么物体？", "请说出{}的物体。", "{}画着什么？", "{}那里是什么？",
            "看看{}，有什么？", "你能说出{}是什么吗？", "画面的{}有什么东西？", "{}是什么东西？", "{}放着什么？",
            "你能在{}找到什么？", "看图，{}是什么？", "图片{}画的是什么？", "{}能看见什么？", "你在{}发现了什么？",
            "{}的物体叫什么？", "告诉我{}有什么。", "{}展示了什么东西？", "位于{}的是什么？", "请问{}是什么东西？",
        ),
        "where": (
            "{}在哪里？", "{}在什么位置？", "{}在哪儿？", "{}在图中的什么地方？", "{}位于哪里？", "找到{}。",
            "你在哪里看到{}？", "图中的{}在哪里？", "请找出{}。", "{}画在哪里？", "你能告诉我{}的位置吗？",
            "{}的位置是什么？", "请问{}在哪里？", "看看{}在什么地方？", "{}在画面的哪一边？", "指出{}在哪里。",
            "你能看到{}在哪里吗？", "能找到{}在哪里吗？", "{}出现在哪里？", "你发现{}在什么地方？",
            "看图，{}在哪里？", "{}处在什么位置？", "请告诉我{}的位置。", "{}画在图的什么地方？", "哪个位置有{}？",
            "你看见{}在哪儿了？",
        ),
        "count": (
            "有几样东西？", "一共有多少样东西？", "图中有几样东西？", "你看到几样东西？", "数一数有几样东西。",
            "图里有多少物体？", "东西一共有几样？", "有多少东西？", "请数一数。", "画面里一共有几样东西？",
            "这里有几样东西？", "图中物体的数量是多少？", "请问有几样东西？", "能数出有几样东西吗？",
            "说出东西的数量。", "共有几样？", "你看见多少东西？", "能找到几样东西？", "你发现了几样东西？",
            "告诉我东西的数量。", "看图，有几样东西？", "这张图有多少东西？", "图上画了几样东西？", "东西有几样？",
            "图片里的东西有多少？", "数数看，有多少物体？",
        ),
        "colour": (
            "背景是什么颜色？", "东西后面是什么颜色？", "图片的背景是什么颜色？", "背景的颜色是什么？",
            "底色是什么？", "背景是哪种颜色？", "后面是什么颜色？", "说出背景的颜色。", "请说出背景颜色。",
            "画面的底色是什么？", "请问背景是什么颜色？", "背景用了什么颜色？", "这里的背景是什么颜色？",
            "能说出背景的颜色吗？", "看看背景，是什么颜色？", "后面的颜色是什么？", "你看到的背景是什么颜色？",
            "看图，背景是什么颜色？", "告诉我底色是什么。", "这张图用什么颜色作背景？", "画面背景呈什么颜色？",
            "后面用了哪种颜色？", "背景是哪个颜色？", "图里的底色是哪种？", "你能看出背景颜色吗？",
            "东西画在什么颜色上？",
        ),
        "yesno": (
            "有{}吗？", "你看到{}了吗？", "图中有{}吗？", "图里有没有{}？", "你能看到{}吗？", "这里有{}吗？",
            "画面中有{}吗？", "能找到{}吗？", "请问有{}吗？", "画面里有没有{}？", "这张图中有{}吗？",
            "你看得见{}吗？", "有没有画{}？", "看看有没有{}。", "图里出现{}了吗？", "能看见{}吗？", "你能发现{}吗？",
            "能看到{}吗？", "图上画了{}吗？", "看图，有{}吗？", "告诉我有没有{}。", "你看见{}了没有？",
            "图里找得到{}吗？", "这些东西里有{}吗？", "有没有看到{}？", "这里有没有{}？",
        ),
        "beside": (
            "{1}的{0}是什么？", "{1}{0}有什么？", "告诉我{1}的{0}是什么。", "你在{1}的{0}看到什么？",
            "说出{1}{0}的东西。", "{1}{0}是什么？", "看看{1}的{0}，有什么？", "能在{1}的{0}找到什么？",
            "{1}的{0}画了什么？",
        ),
        "larger": (
            "{}和{}哪个更大？", "哪个比较大，{}还是{}？", "哪一个更大，{}还是{}？", "{}和{}相比，哪个大？",
            "告诉我{}和{}哪个更大。", "比一比{}和{}，哪个更大？", "{}大还是{}大？", "{}和{}，大的是哪个？",
        ),
    },
}  # fmt: skip
CAPTION_REQUESTS = {
    "en": (
        "Describe the picture.", "Say what the picture shows.", "Describe what you see.", "Write a caption.",
        "Give a description of the picture.", "What does the whole picture look like?",
    ),
    "zh": ("描述这张图片。", "说说图中的内容。", "描述你看到的画面。", "给图片写一句说明。", "整张图是什么样的？"),
}  # fmt: skip


def ground_phrase(ground: int, language: str) -> str:
    colour = COLOURS[language][ground]
    return f"{colour}背景" if language == "zh" else f"{colour} ground"


def count_phrase(scene: Scene, language: str) -> str:
    number = NUMBERS[language][len(scene.things) - 1]
    if language == "zh":
        return f"{number}样东西"
    return f"{number} thing" if len(scene.things) == 1 else f"{number} things"


def caption(scene: Scene, language: str) -> str:
    """One sentence that says everything: how many things, the ground's colour, each thing and its place."""
    count, ground = count_phrase(scene, language), ground_phrase(scene.ground, language)
    names = [(name(thing.concept, language), PLACES[language][thing.place]) for thing in scene.things]
    if language == "zh":
        return f"{ground}上有{count}：" + "，".join(f"{place}是{what}" for what, place in names) + "。"
    listed = ", ".join(f"{what} at the {place}" for what, place in names)
    article = "an" if ground[0] in "aeiou" else "a"
    return f"{count.capitalize()} on {article} {ground}: {listed}."


def notes(scene: Scene, language: str, rng: Random) -> str:
    """The scene as scattered remarks, some repeated, in any order: what a reader of patches gets, in words."""
    space = "" if language == "zh" else " "
    remarks = [PLACES[language][thing.place] + space + name(thing.concept, language) for thing in scene.things]
    remarks.append(ground_phrase(scene.ground, language))
    remarks *= rng.choice((1, 1, 2, 4))
    if rng.random() < 0.5:  # otherwise they must be counted
        remarks.append(count_phrase(scene, language))
    rng.shuffle(remarks)
    return REMARKS_APART[language].join(remarks)


def with_article(subject: str) -> str:
    """A cat, an apple, any grapes."""
    if subject.endswith("s") and not subject.endswith("ss"):
        return f"any {subject}"
    return f"{'an' if subject[0] in 'aeiou' else 'a'} {subject}"


def ask(
    scene: Scene, kind: str, language: str, rng: Random, vocabulary: int | None = None, wordings: dict = QUESTIONS
) -> tuple[str, str]:
    """A question of one kind about a scene and its exact answer; half of the yes/no questions are about an absence.

    wordings: as QUESTIONS has them. Raises ValueError for a kind that no question can be asked of.
    """
    thing = rng.choice(scene.things)
    place, answer = PLACES[language][thing.place], ""
    subjects = [name(thing.concept, language)]
    if kind == "what":
        answer = list_of_names(scene, language)
    elif kind == "at":
        subjects, answer = [place], subjects[0]
    elif kind == "where":
        answer = place
    elif kind == "count":
        answer = NUMBERS[language][len(scene.things) - 1]
    elif kind == "colour":
        answer = COLOURS[language][scene.ground]
    elif kind == "yesno":
        answer = YES_NO[language][0]
        if rng.random() < 0.5:
            subjects, answer = [name(rng.choice(absent(scene, vocabulary)), language)], YES_NO[language][1]
    elif kind in RELATIONS and kind in askable(scene):
        subjects, answer = _relation(scene, kind, language, rng)
    else:
        raise ValueError(f"kind {kind!r} is none of {', '.join(askable(scene))}")
    article = with_article(subjects[0]) if language == "en" else ""
    return rng.choice(wordings[language][kind]).format(*subjects, a=article), answer


def list_of_names(scene: Scene, language: str) -> str:
    return NAMES_APART[language].join(name(thing.concept, language) for thing in scene.things)


def absent(scene: Scene, vocabulary: int | None = None) -> list[int]:
    """The concepts that a scene does not show."""
    present = {thing.concept for thing in scene.things}
    return [concept for concept in range(vocabulary or len(concepts())) if concept not in present]


def askable(scene: Scene) -> tuple[str, ...]:
    """The kinds of questions that have one answer about this scene."""
    possible = {"beside": neighbours(scene), "larger": unequal(scene)}
    return KINDS + tuple(kind for kind in RELATIONS if possible[kind])


def neighbours(scene: Scene) -> list[tuple[Thing, int, Thing]]:
    """Thing, direction (an index into DIRECTIONS), and the only thing that lies further in that direction."""
    found = []
    for thing in scene.things:
        row, column = divmod(thing.place, 3)
        for direction in range(len(DIRECTIONS["en"])):
            beyond = [
                other for other in scene.things
                if (other.place % 3 < column, other.place % 3 > column, other.place // 3 < row,
                    other.place // 3 > row)[direction]
            ]  # fmt: skip
            if len(beyond) == 1:
                found.append((thing, direction, beyond[0]))
    return found


def unequal(scene: Scene) -> list[tuple[Thing, Thing]]:
    """Pairs, the larger one first, of which one is larger than the other at a glance."""
    return [(a, b) for a in scene.things for b in scene.things if a.size > LARGER * b.size]


def _relation(scene: Scene, kind: str, language: str, rng: Random) -> tuple[list[str], str]:
    """What a question of the kind is about, in the order of its wordings, and the answer."""
    if kind == "beside":
        thing, direction, other = rng.choice(neighbours(scene))
        return [DIRECTIONS[language][direction], name(thing.concept, language)], name(other.concept, language)
    pair = rng.choice(unequal(scene))
    answer = name(pair[0].concept, language)
    return [name(thing.concept, language) for thing in rng.sample(pair, 2)], answer
