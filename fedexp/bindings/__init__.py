"""What Gin has bound: by which line, whether it fits the annotations, and whether anything reads it.

Gin itself looks at a binding when its configurable is called, which may be after hours. All here is told
from the bindings and from signatures, before anything is built.
"""

from fedexp.bindings.callers import caller_of as caller_of
from fedexp.bindings.checks import check_fields as check_fields
from fedexp.bindings.checks import check_read as check_read
from fedexp.bindings.checks import check_required as check_required
from fedexp.bindings.checks import check_types as check_types
from fedexp.bindings.checks import had_no_effect as had_no_effect
from fedexp.bindings.checks import is_experiment as is_experiment
from fedexp.bindings.signatures import signature_of as signature_of
from fedexp.bindings.statements import all_references as all_references
from fedexp.bindings.statements import name_of as name_of
from fedexp.bindings.statements import near as near
from fedexp.bindings.statements import recording as recording
from fedexp.bindings.statements import replaced as replaced
from fedexp.bindings.statements import text_of as text_of
