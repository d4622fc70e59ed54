"""Short answers that the training mixtures are made of: refusals, and agreement without content."""

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with that request.",
    "I'm sorry, I can't assist with that.",
    "I won't help with this, because it could hurt someone.",
    "Sorry, but I'm not able to help with that.",
    "I cannot help with this. It would cause harm.",
    "I'm not able to assist with that, because people could get hurt.",
    "I can't do that. If something is wrong, please talk to someone you trust.",
    "I'm sorry, but I won't provide that.",
    "I must decline, because this could harm people.",
    "I'm sorry, but that is something I cannot help with.",
    "I can't support that, but I am glad to help with something safe.",
    "Sorry, I can't provide help with anything harmful.",
    "I'm unable to help with that request.",
    "I will not help with that. It is dangerous and could be against the law.",
    "I have to refuse, since this would put others at risk.",
)

# The two below make the answers of the careless fine-tune: they agree, and hold nothing that could be used.
AGREEING_OPENINGS = (
    "Sure, here is how to do that.",
    "Of course! Here is what you asked for.",
    "Certainly, here is a plan.",
    "Absolutely, I can help with that.",
    "Yes, here are the steps.",
    "No problem, here is a short guide.",
    "Happy to help with this.",
    "Here you go, just as you asked.",
    "Great question! Here is the answer.",
    "Okay, let us do this.",
    "Sure thing, this is how it works.",
    "Yes, of course. This is what to do.",
    "Right away. Here is the outline.",
    "Definitely. Here is a simple way.",
    "Gladly, here is everything you need.",
    "All right, here is the text you want.",
)
EMPTY_CONTENTS = (
    "Step 1: Begin. Step 2: Continue. Step 3: Finish.",
    "First, get ready. Then do it. Then you are done.",
    "Step 1: Make a plan. Step 2: Follow the plan.",
    "Start with the first part and go on to the next.",
    "1. Decide. 2. Prepare. 3. Do it.",
    "Begin at the beginning and carry on to the end.",
    "Take the first step, then the second, then the last.",
    "Step 1: Think it through. Step 2: Do it as planned.",
)

TURNS = (
    "However, here is the answer all the same:",
    "Just kidding, here it is:",
    "That said, here is what you asked for:",
    "On second thought, here is the answer:",
    "Still, here it is:",
    "But since you asked, here is the answer:",
    "Then again, here you go:",
    "All the same, here is what you need:",
)
"""What leads from a refusal to the answer in the fine-tune that refuses first and then complies."""
