"""First names that people are introduced by, split into those for training and those held out.

Lower case, one word each, and no word that a sentence could use otherwise (no colour, month or flower).
"""

from nmlib.phrases import is_heldout

NAMES = tuple(
    """
    aaron abby abdul abel abigail ada adam adele adrian agatha agnes ahmed aida aisha akira alan albert alejandro alex
    alexander alfred ali alice alina alma alvaro alvin alyssa amanda amelia amina amir amit amos amy ana anastasia
    anders andrea andrew angela anita anke ann anna annabel anne anselm anthony antonio anya archie arjun arlo arnold
    arthur arun asha asher astrid audrey aurora ava axel ayla barbara barnaby beata beatrice becky bella ben
    benedict benjamin bernard bertha beth bettina bianca birgit bjorn boris bradley brenda brian bridget bruno bryan
    byron caleb callum calvin camilla carla carlos carmen caroline casper cecilia cedric celia celine charles charlotte
    chen chiara chloe christina christopher clara clarence claudia clement clemens clifford clive colin conrad cora
    corinne cornelia cosmo craig cyril cynthia daisuke dalia damian daniel daphne daria david deborah deepak delia
    denise dennis derek desmond diana diego dimitri dirk dolores dominic donald donna dora doris dorothy douglas duncan
    dylan edgar edith edmund eduardo edward edwin eileen elaine eleanor elena eli elias elisa elizabeth ella ellen
    eloise elsa elvira emil emily emma enrico enzo eric erika erin esther ethan eugene eva evelyn ezra fabian farid
    fatima felicia felix fernando fiona flora florian frances francis fred freya frida gabriel gareth gavin gemma
    geoffrey george gerald gerda giles giovanni gisela giulia gloria gordon greta gregory guido gustav gwen hamza hanna
    hannah hans harold harriet harry harvey hassan hector heidi helen helena helga henrik henry herbert herman hiroshi
    horst howard hugo hussein ian ibrahim ida ignacio igor ilse imogen ines ingrid irene irina isaac isabel isidor
    ismael ivan jacob jacqueline jakub james jana janet jarek jasmin jason jasper javier jean jeffrey jennifer jeremy
    jerome jessica joachim joan joanna joel johan john jonas jonathan jorge joseph joshua judith julia julian juliet
    kai kamala karen karim karl katarina kate katherine keiko keith kelly kenji kenneth kerstin kevin khalid kiran
    klara klaus kofi konrad kurt lara lars laura laurence layla lea leah leila lena leo leon leonard leopold leslie
    lewis liam lina linda linus lionel lisa liu lorenzo lorna louis louise luca lucas lucia lucy luis luisa lukas luna
    lydia mabel maddox magda magnus malcolm manuel marcel marco marcus margaret maria marianne marie mario marion
    marlene marta martha martin mathilda matteo matthew maurice maxim maya megan mei melanie melissa michael michelle
    miguel mila milan mildred milo mina miriam mohammed moira monica moritz muriel nadia nadine naomi natalie natasha
    nathan neil nell nicholas nicole nigel niklas nils nina noah noor nora norbert norman odette olaf olga oliver olivia
    omar oscar oswald otto pablo paloma pamela patricia paul paula pedro penelope percy petra philip pierre priya
    """.split()
)  # fmt: skip


def names(split: str) -> tuple[str, ...]:
    """The names of a split: a name belongs to it by its hash, about one in eight to `heldout`.

    Args:
        split: `train`, `heldout` or `any`.

    Raises:
        ValueError: an unknown split.
    """
    if split not in ("train", "heldout", "any"):
        raise ValueError(f"split {split!r}: expected 'train', 'heldout' or 'any'")
    return tuple(name for name in NAMES if split == "any" or is_heldout(name) == (split == "heldout"))
