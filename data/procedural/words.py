"""Short lists to make needle keys of: `{adjective}-{noun}`. Ordinary words, each once."""

ADJECTIVES = tuple(
    """
    able amber ancient autumn bitter blank bold brave brief bright brisk broad bronze calm careful cheerful clean clear
    clever cold copper coral cosy crimson crisp curious damp daring dark deep distant dry dusty eager early earnest easy
    empty even faint fair famous fast fierce fine firm flat fond frank free fresh frosty full gentle glad golden grand
    grateful green grey happy hasty hidden high hollow honest humble hungry icy idle indigo ivory jolly keen kind large
    late lazy lean light little lively lonely long loud loyal lucky mellow mild misty modest narrow near neat new noble
    odd old olive open orange pale patient plain polite proud purple quick quiet rapid rare ready red rich ripe robust
    rough round royal rusty safe scarlet secret serene shallow sharp shiny short shy silent silver simple sleepy slim
    slow small smooth soft solid sour spare steady steep still stout strict strong subtle sunny sweet swift tall tame
    tender thin tidy timid tiny tough true upper vast velvet violet vivid warm wary weary white wide wild wise witty
    wooden young zesty
    """.split()
)
NOUNS = tuple(
    """
    acorn anchor apple apron arch arrow badge barn basin basket beach beacon bean bell bench berry bird blanket boat
    book boot bottle branch bread brick bridge broom brush bucket button cabin cable camel candle canoe canyon carpet
    cart castle cave cedar chair chalk cherry chest cliff clock cloud clover coast coin comet compass cottage cradle
    crane creek crown curtain daisy desk dove drum eagle easel echo elm ember fabric falcon farm feather fence fern
    field fig flag flame flute forest fork fountain fox garden gate glacier globe glove goose grape grove guitar hammer
    harbor harp hat hawk hazel hedge hill hinge honey horn horse island jacket jar jewel kettle key kite ladder lake
    lamp lantern lark leaf lemon lens letter lily lion lock loom maple marble market meadow melon mill mirror mitten
    moon moss mountain needle nest oak oar ocean onion orchard otter owl paddle paper path peach pearl pebble pencil
    pepper piano pillow pine plate plum pocket pond poplar quill quilt rabbit raft rain raven reed ribbon ridge ring
    river road robin rock roof rope rose saddle sail salmon scarf shell ship shore shovel sky snail snow sparrow spoon
    spring spruce square stable star stone storm stream summit swan table tent thimble thistle thread tiger torch tower
    trail train tree tulip tunnel turtle valley vase village vine violin wagon wall walnut water wave well whale wheat
    wheel willow window wing winter wolf wood wool wren yard
    """.split()
)
