// Numbers in memory and in registers: TYPE 0 float16, 1 bfloat16, 2 float.

template <int TYPE> struct Numbers { typedef u16 Type; };
constexpr int FLOAT = 2;
template <> struct Numbers<FLOAT> { typedef float Type; };
template <int TYPE> DEVICE float read(typename Numbers<TYPE>::Type v) {
  if constexpr (TYPE == FLOAT) return v;
  else return widened<TYPE>(v);
}
template <int TYPE> DEVICE typename Numbers<TYPE>::Type written(float f) {
  if constexpr (TYPE == FLOAT) return f;
  else return narrowed<TYPE>(f);
}
