"""The nine pinned emoji packages and the name list: what the image set is made from.

Only packages under permissive or attribution licences are listed. Sets under share-alike licences
(OpenMoji, the first EmojiOne) stay out, of the pictures and of the weights.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One npm package: ``style`` is the neutral word used in captions, ``home`` the
    GitHub project of the drawings, ``sha512`` the tarball's digest."""

    style: str
    package: str
    version: str
    licence: str
    author: str
    home: str
    sha512: str

    @property
    def tarball(self) -> str:
        """File name that ``npm pack`` gives to this package."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


STYLES = (
    Source("twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twitter",
           "jdecked/twemoji",
           "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="),
    Source("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc",
           "googlefonts/noto-emoji",
           "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="),
    Source("blob", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Google Inc",
           "googlefonts/noto-emoji",
           "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA=="),
    Source("fluent", "@iconify-json/fluent-emoji", "1.2.7", "MIT", "Microsoft Corporation",
           "microsoft/fluentui-emoji",
           "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA=="),
    Source("flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft Corporation",
           "microsoft/fluentui-emoji",
           "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="),
    Source("mono", "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", "Microsoft Corporation",
           "microsoft/fluentui-emoji",
           "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w=="),
    Source("fx", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "Mozilla",
           "mozilla/fxemoji",
           "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ=="),
    Source("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "Emoji One",
           "EmojiTwo/emojitwo",
           "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg=="),
    Source("silhouette", "@iconify-json/emojione-monotone", "1.2.1", "CC-BY-4.0", "Emoji One",
           "EmojiTwo/emojitwo",
           "cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA=="),
)

NAMES = Source("", "emojibase-data", "17.0.0", "MIT", "Miles Johnson",
               "milesj/emojibase",
               "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==")

GROUPS = ("smileys", "people", "component", "nature", "food", "travel", "activities", "objects",
          "symbols", "flags")
